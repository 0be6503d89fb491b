"""Activations on disk: the same gradients, little in memory meanwhile, and room that is used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipelined import cut, in_stages, made
from torch import Tensor, nn

import shardwise.parallel.activations as activations
from shardwise.errors import SpecError
from shardwise.models.gpt import GPT
from shardwise.models.profile import profile
from shardwise.parallel.activations import Offloaded
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.plan.support import SEVERAL_STAGES
from shardwise.spec.plan import Offload, Plan, Recompute
from tests.ranks import Rank, run_ranks

DISK = Offload(activations="disk")
FULL = Recompute(mode="full")


@pytest.fixture(autouse=True)
def everything_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SMALLEST", 256)


def gradients(rank: Rank, name: str, plan: Plan, folder: str) -> list[Tensor]:
    from test_pipelined import loss, micro

    module = made(name)
    replica = parallelize(module, plan, rank.mesh(plan), scratch=folder)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for number in range(3):
        step(replica, [optimizer], [micro(name, number, 0, index) for index in range(2)], loss=loss)
    replica.close()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("recompute", [Recompute(), FULL, Recompute(mode="selective")], ids=lambda one: one.mode)
@pytest.mark.parametrize("name", ["dropout", "resnet", "encoder"])
def test_parameters_are_the_same_bits(tmp_path: Path, name: str, recompute: Recompute) -> None:
    plain = run_ranks(1, gradients, name, Plan(precision="float64"), str(tmp_path))[0]
    plan = Plan(precision="float64", offload=DISK, recompute=recompute)
    for one, other in zip(plain, run_ranks(1, gradients, name, plan, str(tmp_path))[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "schedule", ["1f1b", *(pytest.param(s, marks=pytest.mark.slow) for s in ("gpipe", "interleaved", "zbv"))]
)
def test_stages_offload_under_every_schedule(schedule: str) -> None:
    virtual = 2 if schedule in SEVERAL_STAGES else 1
    plan = cut("dropout", Plan(precision="float64", microbatches=4, pipeline=2, schedule=schedule, virtual=virtual))
    away = Plan(**{**{f: getattr(plan, f) for f in plan.__struct_fields__}, "offload": DISK})
    kept = run_ranks(2, in_stages, "dropout", plan, {})
    for here, there in zip(kept, run_ranks(2, in_stages, "dropout", away, {}), strict=True):
        assert there[0] == here[0]


def test_autocast_and_several_backwards_find_what_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    away = Offloaded(module, "disk", torch.device("cpu"), tmp_path)
    x = torch.randn(40, 32)

    def found(offload: bool) -> list[Any]:
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if offload:
                with away.around():
                    output = module(x).square().sum()
            else:
                output = module(x).square().sum()
        first = torch.autograd.grad(output, list(module.parameters()), retain_graph=True)
        second = torch.autograd.grad(output, list(module.parameters()))
        return [*first, *second]

    assert all(torch.equal(a, b) for a, b in zip(found(False), found(True), strict=True))
    away.close()


def test_little_is_in_memory_and_the_file_does_not_grow(tmp_path: Path) -> None:
    module = GPT(layers=4, width=32, heads=2, vocab=64, context=32)
    away = Offloaded(module, "disk", torch.device("cpu"), tmp_path)
    tokens = torch.randint(0, 64, (8, 32))
    spill = away._spill
    assert spill is not None
    found = profile(module, {"tokens": tokens})
    sizes = []
    for _ in range(3):
        with away.around():
            output = module(tokens)
        there = [one for one in (ref() for ref in away._gone.values()) if one is not None]
        assert sum(one.count for one in there) == pytest.approx(8 * found.activation_bytes, rel=0.05), "each once"
        assert all(one._back is None and one.host is None for one in there), "none of it is here"
        output.square().sum().backward()
        del output, there
        assert not away._gone
        sizes.append(spill._size)
    assert sizes[0] == sizes[1] == sizes[2]
    away.close()


def test_a_graph_that_is_thrown_away_gives_its_room_back(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    away = Offloaded(module, "disk", torch.device("cpu"), tmp_path)
    for _ in range(5):
        with away.around():
            module(torch.randn(40, 32))
    assert not away._gone
    assert sum(map(len, away._free.values())) <= 4
    away.close()


def test_host_memory_of_a_cpu_is_refused() -> None:
    plan = Plan(offload=Offload(activations="host"))
    with pytest.raises(SpecError, match="computes in host memory already"):
        parallelize(nn.Linear(2, 2), plan, Rank(0, 1, None).mesh(plan))
