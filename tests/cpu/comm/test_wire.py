"""The algorithms, run over gloo and over shared memory, against gloo's own collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.comm.kernel import library
from shardwise.comm.wire import COMBINE, OPERATIONS, LinkFailure, Wire
from shardwise.spec.collective_cost import ALGORITHMS
from tests.ranks import Rank, run_ranks

PAIRS = [(collective, algorithm) for collective, known in ALGORITHMS.items() for algorithm in known]
CASES = st.fixed_dictionaries(
    {
        "pair": st.sampled_from(PAIRS),
        "numel": st.sampled_from([0, 1, 2, 7, 1000, 70_001]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
        "reduction": st.sampled_from(["SUM", "PRODUCT", "MIN", "MAX"]),
        "root": st.integers(0, 4),
        "segments": st.sampled_from([1, 2, 5]),
        "seed": st.integers(0, 50),
    }
)


def data(seed: int, rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=made).to(dtype)
    return torch.randint(0, 5, (numel,), generator=made).to(dtype)


def backend_of(rank: Rank, monkey: str) -> Any:
    import os

    os.environ["SHARDWISE_TRANSPORT"] = monkey
    group = rank.mesh().axis("data").group
    assert group is not None
    return group._inners["cpu"].backend


def ours(wire: Wire, case: dict[str, Any], rank: Rank, start: torch.Tensor) -> torch.Tensor:
    collective, algorithm = case["pair"]
    tensor = start.clone()
    wire.run(
        collective,
        algorithm,
        tensor,
        range(rank.world),
        rank.rank,
        combine=COMBINE[getattr(OPERATIONS, case["reduction"])],
        root=case["root"] % rank.world,
        segments=case["segments"],
    )
    return tensor


def theirs(gloo: Any, case: dict[str, Any], rank: Rank, start: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """What gloo makes of it, and the part that the collective promises to this rank."""
    collective = case["pair"][0]
    n, root = start.numel(), case["root"] % rank.world
    piece = slice(n // rank.world * rank.rank, n // rank.world * (rank.rank + 1))
    whole, tensor = slice(0, n), start.clone()
    if collective == "broadcast":
        dist.broadcast(tensor, root, group=gloo)
    elif collective == "all_gather":
        parts = [torch.empty_like(start[piece]) for _ in range(rank.world)]
        dist.all_gather(parts, start[piece].clone(), group=gloo)
        tensor = torch.cat(parts)
    else:
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, case["reduction"]), group=gloo)
    promised = {"reduce_scatter": piece, "reduce": whole if rank.rank == root else slice(0, 0)}
    return tensor, promised.get(collective, whole)


def compare(rank: Rank, over: str, cases: list[dict[str, Any]]) -> tuple[list[str], list[bytes]]:
    """What differs from gloo, and the bits of every all-reduce."""
    wire = Wire(backend_of(rank, over))
    gloo = dist.new_group(backend="gloo")
    wrong, bits = [], []
    for case in cases:
        rows = case["numel"] if case["pair"][0] not in ("all_gather", "reduce_scatter") else case["numel"] * rank.world
        start = data(case["seed"], rank.rank, rows, case["dtype"])
        mine = ours(wire, case, rank, start)
        expected, promised = theirs(gloo, case, rank, start)
        rough = case["dtype"] == torch.bfloat16
        close = dict(rtol=5e-2, atol=5e-2) if rough else dict(rtol=1e-5, atol=1e-5)
        if not torch.allclose(mine[promised].double(), expected[promised].double(), **close):
            wrong.append(f"{case}: {mine} but {expected}")
        if case["pair"][0] == "all_reduce":
            bits.append(mine.view(torch.uint8).numpy().tobytes())
    return wrong, bits


def check(n: int, over: str, cases: list[dict[str, Any]]) -> None:
    found = run_ranks(n, compare, over, cases)
    assert [wrong for wrong, _ in found] == [[]] * n
    assert all(bits == found[0][1] for _, bits in found), "the ranks have different bits"


@pytest.mark.parametrize("over", ["gloo", "shm"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_algorithm_agrees_with_gloo(n: int, over: str) -> None:
    if over == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    cases = [
        {"pair": pair, "numel": 1003, "dtype": torch.float32, "reduction": "SUM", "root": 1, "segments": 3, "seed": i}
        for i, pair in enumerate(PAIRS)
    ]
    check(n, over, cases)


@settings(max_examples=12, deadline=None)
@given(cases=st.lists(CASES, min_size=6, max_size=12), n=st.integers(2, 4))
def test_random_tensors_and_operations_agree_with_gloo(cases: list[dict[str, Any]], n: int) -> None:
    check(n, "gloo", cases)


def scrambled(rank: Rank) -> list[float]:
    """Some of the ranks, in an order of their own."""
    wire = Wire(backend_of(rank, "gloo"))
    torch.distributed.barrier()  # a rank without a part must not leave while others still connect
    members = [3, 0, 2]
    if rank.rank not in members:
        return []
    tensor = torch.full((4,), float(rank.rank))
    wire.run("broadcast", "tree", tensor, members, members.index(rank.rank), root=0)
    summed = torch.full((4,), float(rank.rank))
    wire.run("all_reduce", "ring", summed, members, members.index(rank.rank), combine=torch.add)
    return [tensor[0].item(), summed[0].item(), wire.sent]


def test_members_may_be_some_ranks_in_any_order() -> None:
    found = run_ranks(4, scrambled)
    assert found[1] == []
    assert [each[:2] for each in (found[0], found[2], found[3])] == [[3.0, 5.0]] * 3
    assert sum(each[2] for each in found if each) == 4 * 4 * 2 + 4 * 4 * 4


def lost(rank: Rank) -> str:
    import os
    import signal

    wire = Wire(backend_of(rank, "gloo"))
    tensor = torch.ones(1000)
    wire.run("all_reduce", "ring", tensor, range(3), rank.rank, combine=torch.add)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            wire.run("all_reduce", "flat", tensor, range(3), rank.rank, combine=torch.maximum)
    except LinkFailure as error:
        return f"{error.rank}: {error}"


def test_a_lost_connection_names_the_rank() -> None:
    found = run_ranks(3, lost, may_die=(1,))
    for rank in (0, 2):
        assert found[rank].startswith("1: the connection to rank 1 ended"), found[rank]
