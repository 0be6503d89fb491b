"""What ranks measure of each other: every pair and size, alike on all ranks, and true where the truth is known."""

from __future__ import annotations

import time
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm import calibrate as module
from shardwise.comm.calibrate import OPERATIONS, SIZES, calibrate, pair_rounds
from shardwise.comm.group import Group
from shardwise.comm.kernel import library
from shardwise.spec.cluster import Calibration
from tests.ranks import Rank, run_ranks

CPU = torch.device("cpu")
SLOW_S = 0.02
TRANSPORTS = ["gloo", pytest.param("shm", marks=pytest.mark.skipif(library() is None, reason="built without C"))]


def group_of(rank: Rank) -> Group:
    group = rank.mesh().axis("data").group
    assert group is not None
    return group


def measured(rank: Rank, budget_s: float) -> Calibration:
    return calibrate(group_of(rank), CPU, budget_s=budget_s)


@given(st.integers(2, 33), st.booleans())
def test_every_pair_meets_once_in_each_direction(ranks: int, at_once: bool) -> None:
    rounds = list(pair_rounds(ranks, at_once=at_once))
    assert sorted(pair for pairs in rounds for pair in pairs) == sorted(permutations(range(ranks), 2))
    for pairs in rounds:
        assert len(pairs) == 1 or at_once
        assert all(not set(one) & set(other) for one, other in combinations(pairs, 2)), (
            "a rank is in one pair at a time"
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_have_the_same_figures_of_every_pair_and_operation(
    transport: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", transport)
    first, *others = run_ranks(ranks, measured, 0.5, timeout_s=100)
    assert all(other == first for other in others)
    assert (first.backend, first.ranks) == (transport, ranks)
    assert sorted((pair.source, pair.target) for pair in first.pairs) == sorted(permutations(range(ranks), 2))
    assert all(pair.link.measured and pair.link.latency_s > 0 and pair.link.bandwidth > 0 for pair in first.pairs)
    assert set(first.collectives) == {*OPERATIONS, "barrier"}
    for operation in OPERATIONS:
        rows = first.collectives[operation]
        assert [size for size, _ in rows] == list(SIZES[: len(rows)])
        assert len(rows) > 1
        assert all(seconds > 0 for _, seconds in rows)
    largest = first.seconds("all_reduce", SIZES[len(first.collectives["all_reduce"]) - 1])
    assert largest is not None
    assert largest > first.collectives["all_reduce"][0][1], "32 MB take longer than 1 KB"


def slowed(rank: Rank) -> Any:
    """Rank 1's messages and its all-reduces take SLOW_S longer."""
    group = group_of(rank)
    if rank.rank == 1:
        send, all_reduce = group.send, group.all_reduce

        def slow_send(tensors: Any, dst: int, tag: int = 0) -> Any:
            time.sleep(SLOW_S)
            return send(tensors, dst, tag)

        def slow_all_reduce(tensor: torch.Tensor, *op: Any) -> Any:
            time.sleep(SLOW_S)
            return all_reduce(tensor, *op)

        group.send, group.all_reduce = slow_send, slow_all_reduce  # type: ignore[method-assign]
    module.SIZES = (1 << 10, 1 << 20)  # type: ignore[misc]
    return calibrate(group, CPU, budget_s=0.1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_slow_sender_is_seen_in_its_latencies_and_by_all_in_the_collective(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", transport)
    found: Calibration = run_ranks(3, slowed, timeout_s=100)[0]
    latency = {(pair.source, pair.target): pair.link.latency_s for pair in found.pairs}
    touched = [seconds for pair, seconds in latency.items() if 1 in pair]
    others = [seconds for pair, seconds in latency.items() if 1 not in pair]
    assert min(touched) >= SLOW_S / 2 > max(others), "half of a round trip, on the way there or back"
    assert found.collectives["all_reduce"][0][1] >= SLOW_S
    assert found.collectives["broadcast"][0][1] < SLOW_S


def impatient(rank: Rank) -> Calibration:
    module.CELL_S = 0.0  # type: ignore[misc]
    return calibrate(group_of(rank), CPU, budget_s=0.05)


def test_sizes_that_would_take_too_long_are_left_out() -> None:
    found: Calibration = run_ranks(2, impatient)[0]
    assert all(len(found.collectives[operation]) == 1 for operation in OPERATIONS)


def many(rank: Rank) -> Calibration:
    module.ALONE_UP_TO = 2  # type: ignore[misc]
    module.SIZES = (1 << 10,)  # type: ignore[misc]
    return calibrate(group_of(rank), CPU, budget_s=0.05)


def test_many_ranks_measure_pairs_at_once() -> None:
    found: Calibration = run_ranks(5, many, timeout_s=100)[0]
    assert sorted((pair.source, pair.target) for pair in found.pairs) == sorted(permutations(range(5), 2))
    assert all(pair.link.bandwidth > 0 for pair in found.pairs)
