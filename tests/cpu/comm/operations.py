"""One operation on a group, from a description of it: what tests compare between backends."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist

from shardwise.comm.group import Group
from shardwise.comm.shm import Shm
from tests.cpu.comm.names import all_gather_single, reduce_scatter_single
from tests.ranks import Rank

OPERATIONS = [
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_single",
    "reduce_scatter_single",
    "gather",
    "scatter",
    "all_to_all_single",
    "uneven",
]


def shm_of(rank: Rank, **more: Any) -> Group:
    group = rank.mesh(**more).axis("data").group
    assert group is not None
    assert isinstance(group._inners["cpu"].backend, Shm)
    return group


def data(seed: int, rank: int, numel: int, dtype: torch.dtype, odd: bool = False) -> torch.Tensor:
    """What a rank brings; with `odd` there are infinities, zeros of both signs and values that are no number."""
    made = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        drawn = torch.randn(numel, generator=made)
        if odd:
            rare = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38])
            drawn = torch.where(
                torch.rand(numel, generator=made) < 0.5,
                rare[torch.randint(0, len(rare), (numel,), generator=made)],
                drawn,
            )
        return drawn.to(dtype)
    return torch.randint(0, 5, (numel,), generator=made).to(dtype)


def brought(group: Any, case: dict[str, Any], rank: int) -> tuple[torch.Tensor, Any]:
    """The tensor that a rank brings, where the case wants it to lie; and the reduction."""
    mine = data(case["seed"], rank, case["numel"], case["dtype"], case.get("odd", False))
    if case.get("place") == "shared":
        mine = group.zeros(mine.numel(), mine.dtype, mine.device).copy_(mine)
    elif case.get("place") == "strided":
        mine = mine.new_zeros(mine.numel(), 2)[:, 1].copy_(mine)
    scaled = case["reduction"] == "PREMUL_SUM"
    return mine, dist._make_nccl_premul_sum(0.5) if scaled else getattr(dist.ReduceOp, case["reduction"])


def perform(group: Any, case: dict[str, Any], rank: Rank) -> list[torch.Tensor]:
    """Run one operation on `group`, in which this is `rank`; what it holds afterwards."""
    n, me, numel, root = rank.world, rank.rank, case["numel"], case["root"] % rank.world
    mine, op = brought(group, case, me)
    name, source = case["op"], dist.get_global_rank(group, root)
    if name in ("all_reduce", "reduce"):
        call = dist.all_reduce if name == "all_reduce" else lambda t, **k: dist.reduce(t, source, **k)
        call(mine, op=op, group=group)
        return [mine] if name == "all_reduce" or me == root else []
    if name == "broadcast":
        dist.broadcast(mine, source, group=group)
        return [mine]
    if name == "all_gather":
        out = [torch.empty_like(mine) for _ in range(n)]
        dist.all_gather(out, mine, group=group)
        return out
    if name == "all_gather_single":
        whole = mine.new_empty(n * numel)
        all_gather_single(whole, mine, group=group)
        return [whole]
    if name == "gather":
        out = [torch.empty_like(mine) for _ in range(n)] if me == root else None
        dist.gather(mine, out, dst=source, group=group)
        return out or []
    if name == "scatter":
        parts = [data(case["seed"] + r, root, numel, case["dtype"]) for r in range(n)] if me == root else None
        dist.scatter(mine, parts, src=source, group=group)
        return [mine]
    whole = data(case["seed"], me, n * numel, case["dtype"])
    if name == "reduce_scatter_single":
        reduce_scatter_single(mine, whole, op=op, group=group)
        return [mine]
    if name == "all_to_all_single":
        out_tensor = torch.empty_like(whole)
        dist.all_to_all_single(out_tensor, whole, group=group)
        return [out_tensor]
    draw = random.Random(case["seed"])
    sizes = [[draw.randrange(0, 2 + numel // 2) for _ in range(n)] for _ in range(n)]  # sizes[from][to]
    taken = [row[me] for row in sizes]
    out_tensor = mine.new_empty(sum(taken))
    dist.all_to_all_single(
        out_tensor, data(case["seed"], me, sum(sizes[me]), case["dtype"]), taken, sizes[me], group=group
    )
    return [out_tensor]
