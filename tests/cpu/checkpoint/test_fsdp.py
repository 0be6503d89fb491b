"""The shard axis of the layout is FSDP2's: what it shards is saved, and comes back whole or sharded otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.checkpoint.resume import resume
from shardwise.checkpoint.save import save
from shardwise.checkpoint.state import collect
from shardwise.checkpoint.store import LocalStore
from shardwise.spec.plan import Plan
from tests.cpu.checkpoint.world import bits
from tests.ranks import Rank, run_ranks


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 2))


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.1)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.linspace(-1, 1, 12).reshape(3, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sharded_run(rank: Rank, place: str) -> list[Any]:
    """Resume if there is something, one step, save; returns this rank's local tensors."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.world)
    net = build(seed=9)
    fully_shard(net)
    optimizer = adam(net)
    plan = Plan(shard=rank.world)
    store = LocalStore(place)
    found = resume(store, net, [optimizer], plan=plan, rank=rank.rank)
    step(net, optimizer)
    tensors, scalars = collect(net, [optimizer])
    finished = found.step + 1 if found else 1
    settings: dict[str, Any] = {"plan": plan, "rank": rank.rank, "world": rank.world, "barrier": dist.barrier}
    save(store, step=finished, tensors=tensors, scalars=scalars, **settings)
    dist.destroy_process_group()
    return [finished, any(hasattr(tensor, "full_tensor") for tensor in tensors.values())]


def test_what_fsdp2_shards_is_saved_and_resumed_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    net = build(seed=9)
    optimizer = adam(net)
    assert run_ranks(2, sharded_run, str(tmp_path)) == [[1, True]] * 2
    assert run_ranks(3, sharded_run, str(tmp_path)) == [[2, True]] * 3
    for _ in range(2):
        step(net, optimizer)
    fresh = build(seed=1)
    fresh_optimizer = adam(fresh)
    found = resume(LocalStore(tmp_path), fresh, [fresh_optimizer], plan=Plan(), rank=0)
    assert found is not None
    assert found.step == 2
    expected, _ = collect(net, [optimizer])
    for name, tensor in collect(fresh, [fresh_optimizer])[0].items():
        torch.testing.assert_close(tensor, expected[name])
    assert bits({"s": fresh_optimizer.state[fresh[0].weight]["step"]}) == bits({"s": torch.tensor(2.0)})
