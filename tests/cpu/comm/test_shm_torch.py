"""The path of shared memory that is Python and torch alone, beside the compiled kernel: the same bits."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm import torch_phases
from shardwise.comm.group import Group
from shardwise.comm.kernel import kernel, library
from shardwise.comm.shm import DTYPES, REDUCTIONS
from shardwise.comm.shm_torch import ShmTorch
from shardwise.comm.torch_segment import TEXT, Segment, fixed_bytes
from shardwise.comm.torch_sums import BLOCK, fold
from shardwise.errors import CommError
from tests.cpu.comm.operations import OPERATIONS, data, perform, shm_of
from tests.examples import examples
from tests.ranks import Rank, run_ranks

NEEDS_KERNEL = pytest.mark.skipif(library() is None, reason="built without a C compiler")
PATHS = [pytest.param("kernel", marks=NEEDS_KERNEL), "torch"]

# Sums.


def summed(path: str, out: torch.Tensor, rows: list[torch.Tensor], reduction: Any) -> None:
    """The reduction of `rows` by one of the two."""
    addresses = [row.data_ptr() for row in rows]
    if path == "torch":
        scratch = torch.empty(8 * BLOCK, dtype=torch.uint8)
        fold([out.data_ptr()], addresses, out.nbytes, out.dtype, reduction.name, scratch)
        return
    pointers = (ctypes.c_void_p * len(rows))(*addresses)
    kernel().shm_reduce(out.data_ptr(), pointers, len(rows), out.nbytes, DTYPES[out.dtype], REDUCTIONS[reduction])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_torch(path: str, dtype: torch.dtype, reduction: Any) -> None:
    if reduction.name.startswith("B") and dtype.is_floating_point:
        pytest.skip("bitwise operations take integers")
    rows = [data(seed, 0, 2500, dtype) for seed in range(3)]
    out = torch.empty(2500, dtype=dtype)
    summed(path, out, rows, reduction)
    assert torch.equal(out, by_torch(rows, reduction.name))


def by_torch(rows: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """Row by row from the first, halves in float32 and rounded once."""
    dtype = rows[0].dtype
    exact = torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.int64 if dtype == torch.bool else dtype
    pair = {
        "SUM": torch.add,
        "AVG": torch.add,
        "PRODUCT": torch.mul,
        "MIN": torch.minimum,
        "MAX": torch.maximum,
        "BAND": torch.bitwise_and,
        "BOR": torch.bitwise_or,
        "BXOR": torch.bitwise_xor,
    }[reduction]
    total = functools.reduce(pair, [row.to(exact) for row in rows])
    if reduction == "AVG":
        total = total / len(rows) if exact.is_floating_point else total // len(rows)
    return total.to(dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_to_nearest_even(path: str, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    other = every.roll(12345)
    out = torch.empty_like(every)
    summed(path, out, [every, other], dist.ReduceOp.RedOpType.SUM)
    expected = (every.float() + other.float()).to(dtype)
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert bool(same.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16], ids=str)
@pytest.mark.parametrize("place", range(3))
def test_a_sum_may_lie_where_one_of_its_terms_lay(dtype: torch.dtype, place: int) -> None:
    rows = [data(seed, 0, BLOCK + 100, dtype) for seed in range(3)]
    expected = by_torch(rows, "SUM")
    summed("torch", rows[place], rows, dist.ReduceOp.RedOpType.SUM)
    assert torch.equal(rows[place], expected)


# The same bits.

SIZES = [0, 1, 7, 1000, 8193, 65_537, 300_001]
REDUCED = {
    **dict.fromkeys(["SUM", "AVG", "PRODUCT", "MIN", "MAX"], list(DTYPES)),
    "PREMUL_SUM": [dtype for dtype in DTYPES if dtype.is_floating_point],
    **dict.fromkeys(["BAND", "BOR", "BXOR"], [dtype for dtype in DTYPES if not dtype.is_floating_point]),
}
CASES = st.sampled_from(list(REDUCED)).flatmap(
    lambda reduction: st.fixed_dictionaries(
        {
            "op": st.sampled_from(OPERATIONS),
            "numel": st.sampled_from(SIZES),
            "dtype": st.sampled_from(REDUCED[reduction]),
            "reduction": st.just(reduction),
            "root": st.integers(0, 3),
            "seed": st.integers(0, 50),
            "odd": st.booleans(),
            "place": st.sampled_from(["", "", "shared", "strided"]),
            "group": st.integers(0, 2),
        }
    )
)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, with one pattern for what is no number: which one that has, no standard says."""
    tensor = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.view(torch.uint8)


def both_paths(rank: Rank, cases: list[dict[str, Any]]) -> list[str]:
    """Every case on the kernel and on torch, in the whole world, its first two ranks or its last ones in turn."""
    rank.mesh()
    groups: dict[tuple[str, int], Any] = {}
    members = [list(range(rank.world)), [0, 1], list(range(rank.world))[-2::-1] or [0]]
    for transport in ("shm", "shm-torch"):
        os.environ["SHARDWISE_TRANSPORT"] = transport
        for number, ranks in enumerate(members):
            groups[transport, number] = dist.new_group(sorted(ranks), backend="shm")
    wrong = []
    for case in cases:
        ranks = sorted(members[case["group"]])
        if rank.rank not in ranks:
            continue
        me = Rank(ranks.index(rank.rank), len(ranks), None)
        found = [perform(groups[transport, case["group"]], case, me) for transport in ("shm", "shm-torch")]
        if any(not torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True)):
            wrong.append(f"{case}: {found}")
    kinds = [isinstance(groups["shm-torch", 0]._inners["cpu"].backend, ShmTorch)]
    kinds += [not isinstance(groups["shm", 0]._inners["cpu"].backend, ShmTorch)]
    for group in groups.values():
        if isinstance(group, Group):
            group.shutdown()  # a rank that ends without it has died, for the others
    return wrong if all(kinds) else ["both are one path"]


@NEEDS_KERNEL
@examples(10)
@given(n=st.integers(2, 4), cases=st.lists(CASES, min_size=20, max_size=40))
def test_both_paths_give_the_same_bits(n: int, cases: list[dict[str, Any]]) -> None:
    for wrong in run_ranks(n, both_paths, cases):
        assert wrong == []


# What only this path can get wrong.


def without_memory(rank: Rank) -> str:
    """Something of Python's own fails on one rank, in the middle of an operation."""
    os.environ["SHARDWISE_TRANSPORT"] = "shm-torch"
    group = shm_of(rank)

    def refuse(*_: Any) -> None:
        raise MemoryError("no room")

    if rank.rank == 1:
        torch_phases.fold = refuse
    try:
        group.all_reduce(torch.ones(10)).wait()
        group.barrier().wait()
    except (CommError, MemoryError) as error:
        return str(error)
    return "no error"


def test_an_error_inside_an_operation_is_known_to_all_ranks() -> None:
    first, second, third = run_ranks(3, without_memory)
    assert "rank 1 could not go on: MemoryError no room" in first
    assert "rank 1 could not go on: MemoryError no room" in third
    assert "no room" in second


def without_gradients(rank: Rank) -> list[float]:
    """A backend writes past autograd: what it changes are not updates that a graph must know of."""
    os.environ["SHARDWISE_TRANSPORT"] = "shm-torch"
    group = shm_of(rank)
    weight = torch.nn.Parameter(torch.ones(40_000))
    loss = weight.square().sum()
    group.all_reduce(weight).wait()
    loss.backward()
    with torch.inference_mode():
        plain = torch.ones(40_000)
        group.all_reduce(plain).wait()
    assert weight.grad is not None
    return [float(weight.detach()[0]), float(weight.grad[0]), float(plain[0])]


def test_autograd_does_not_see_what_a_collective_writes() -> None:
    assert run_ranks(2, without_gradients) == [[2.0, 4.0, 2.0]] * 2


def test_the_earliest_reason_is_everybodys() -> None:
    memory = mmap.mmap(-1, fixed_bytes(3))
    ranks = [Segment(memory, rank, 3) for rank in range(3)]
    assert [each.why() for each in ranks] == [""] * 3
    ranks[2].fail("x" * 2000)
    ranks[0].words[0] = 0  # rank 1 had not seen it yet
    ranks[1].fail("another reason")
    assert all(each.failed and each.why() == "x" * (TEXT - 1) for each in ranks)
