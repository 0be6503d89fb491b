"""Costs against the schedules they are the costs of, against textbooks, and what follows from them for a choice."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm.algorithms import Schedule, schedule
from shardwise.errors import SpecError
from shardwise.spec.cluster import Link
from shardwise.spec.collective_cost import (
    ALGORITHMS,
    Path,
    Shape,
    Topology,
    choose,
    seconds,
    shape,
    split,
    through,
)

PAIRS = [(collective, algorithm) for collective, known in ALGORITHMS.items() for algorithm in known]
SIZES = [*range(2, 34), 48, 63, 64]
ETHERNET = Path(50e-6, 1.25e8, message_s=20e-6, add_s=1e-10)


def counted(schedules: list[Schedule]) -> Shape:
    """The shape of an algorithm, counted in its schedules."""
    pieces = schedules[0].pieces
    rounds = sorted({step.round for each in schedules for step in each.steps})
    path, busy = [0.0] * 3, [0.0] * 3
    for each in schedules:
        steps = [_of(step, pieces) for step in each.steps]
        total = [sum(column) for column in zip(*steps, strict=True)] or [0.0] * 5
        busy = [max(a, b) for a, b in zip(busy, (max(total[:2]), max(total[2:4]), total[4]), strict=True)]
    for at in rounds:
        here = [_of(step, pieces) for each in schedules for step in each.steps if step.round == at]
        path[0] += max(max(sends, receives) for sends, receives, *_ in here)
        path[1] += max(max(out, into) for _, _, out, into, _ in here)
        path[2] += max(adds for *_, adds in here)
    return Shape(len(rounds), *path, *busy)


def _of(step: object, pieces: int) -> tuple[float, float, float, float, float]:
    out = sum(m.last - m.first for m in step.sends) / pieces  # type: ignore[attr-defined]
    into = sum(m.last - m.first for m in step.receives) / pieces  # type: ignore[attr-defined]
    adds = sum(m.last - m.first for m in step.receives if m.add) / pieces  # type: ignore[attr-defined]
    return len(step.sends), len(step.receives), out, into, adds  # type: ignore[attr-defined]


@pytest.mark.parametrize(("collective", "algorithm"), PAIRS)
def test_costs_are_those_of_the_schedules(collective: str, algorithm: str) -> None:
    for size in SIZES:
        found = counted([schedule(collective, algorithm, rank, size) for rank in range(size)])
        assert shape(collective, algorithm, size) == pytest.approx(found), size


def test_the_formulas_of_the_textbooks() -> None:
    """Thakur et al. 2005, section 4.5: a seconds of latency, b a byte, c an addition, n bytes, p ranks."""
    a, b, c, n, p = 1e-4, 1e-8, 3e-10, 1e6, 8
    wire = Path(a, 1 / b, add_s=c)
    assert seconds("all_reduce", "ring", n, p, wire, segments=1) == pytest.approx(
        2 * (p - 1) * a + 2 * (p - 1) / p * n * b + (p - 1) / p * n * c
    )
    assert seconds("all_reduce", "halving_doubling", n, p, wire, segments=1) == pytest.approx(
        2 * 3 * a + 2 * (p - 1) / p * n * b + (p - 1) / p * n * c
    )
    assert seconds("broadcast", "halving_doubling", n, p, wire, segments=1) == pytest.approx(
        (3 + 3) * a + 2 * (p - 1) / p * n * b
    )
    chain = seconds("broadcast", "ring", n, p, wire._replace(message_s=1e-5), segments=4)
    assert chain == pytest.approx((p - 1) * (a + 1e-5 + n / 4 * b) + 3 * n / 4 * b)


def test_a_tree_moves_large_tensors_as_fast_as_a_ring_and_needs_fewer_rounds() -> None:
    """Sanders et al. 2009: full bandwidth in both directions, a latency that grows with log p."""
    n, p = 1e9, 256
    tree, ring = seconds("all_reduce", "tree", n, p, ETHERNET), seconds("all_reduce", "ring", n, p, ETHERNET)
    assert tree < 1.3 * ring
    few = 1 << 10
    assert seconds("all_reduce", "tree", few, p, ETHERNET) < 0.1 * seconds("all_reduce", "ring", few, p, ETHERNET)


@given(
    nbytes=st.integers(0, 1 << 30),
    ranks=st.integers(1, 64),
    latency=st.floats(1e-6, 0.1),
    bandwidth=st.floats(1e5, 1e11),
    collective=st.sampled_from(sorted(ALGORITHMS)),
)
def test_the_choice_is_the_cheapest(nbytes: int, ranks: int, latency: float, bandwidth: float, collective: str) -> None:
    wire = Path(latency, bandwidth, 2e-5, 1e-10)
    found = choose(collective, nbytes, ranks, wire)
    for algorithm in ALGORITHMS[collective]:
        for segments in (None, 1):
            assert found.seconds <= seconds(collective, algorithm, nbytes, ranks, wire, segments=segments) + 1e-12
    assert found.seconds >= 0
    assert choose(collective, nbytes, ranks, wire, only="ring").algorithm == "ring"


def test_few_bytes_want_few_rounds_and_many_bytes_want_few_bytes() -> None:
    assert choose("all_reduce", 4, 2, ETHERNET).algorithm == "flat"
    assert choose("all_reduce", 4, 64, ETHERNET).algorithm in ("halving_doubling", "tree")
    assert choose("all_reduce", 1 << 28, 5, ETHERNET).algorithm in ("ring", "two_shot")
    assert choose("broadcast", 4, 3, ETHERNET).algorithm == "flat"
    assert choose("broadcast", 1 << 28, 9, ETHERNET).algorithm in ("tree", "ring")


def test_a_plain_link_is_a_path() -> None:
    assert seconds("all_reduce", "ring", 4e6, 4, Link(latency_s=1e-3, bandwidth=1e9)) == pytest.approx(6e-3 + 6e-3)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SpecError, match="'rign' is none of .*did you mean 'ring'"):
        seconds("all_reduce", "rign", 4, 4, ETHERNET)
    with pytest.raises(SpecError, match="all_reduce"):
        seconds("allreduce", "ring", 4, 4, ETHERNET)


# Several paths.


def test_large_tensors_are_shared_in_proportion_to_bandwidth() -> None:
    fast, slow = Path(1e-4, 12.5e6), Path(1e-4, 6.25e6)
    found = split("all_reduce", 25 << 20, 2, [slow, fast])
    parts = {share.path: share.nbytes for share in found.shares}
    assert sum(parts.values()) == 25 << 20
    assert parts[1] / parts[0] == pytest.approx(2, rel=0.01)
    assert found.seconds == pytest.approx((25 << 20) / (12.5e6 + 6.25e6), rel=0.01)


def test_small_tensors_take_the_path_that_is_first() -> None:
    near, far = Path(1e-4, 12.5e6), Path(5e-3, 125e6)
    assert [share.path for share in split("all_reduce", 4096, 2, [far, near]).shares] == [1]
    assert {share.path for share in split("all_reduce", 1 << 22, 2, [far, near]).shares} == {0, 1}


@given(
    nbytes=st.integers(0, 1 << 28),
    ranks=st.integers(1, 9),
    paths=st.lists(
        st.builds(lambda a, b: Path(a, b), st.floats(1e-6, 0.1), st.floats(1e5, 1e10)), min_size=1, max_size=4
    ),
)
def test_shares_add_up_and_end_together(nbytes: int, ranks: int, paths: list[Path]) -> None:
    found = split("all_reduce", nbytes, ranks, paths)
    assert sum(share.nbytes for share in found.shares) == nbytes
    assert all(share.nbytes >= 0 for share in found.shares)
    best_alone = min(choose("all_reduce", nbytes, ranks, path).seconds for path in paths)
    if len(paths) == 1:
        assert found.seconds == pytest.approx(best_alone)
    assert found.seconds <= best_alone * 1.5 + 1e-6  # cut for whole tensors; segments make single paths quicker still


# Hosts.


def test_a_host_sends_what_leaves_it_once() -> None:
    inside, between = Path(20e-6, 10e9), Path(1e-4, 12.5e6, 20e-6)
    four = Topology((2, 2), inside, (between,))
    found = through("all_reduce", 25 << 20, four)
    ring = seconds("all_reduce", "ring", 25 << 20, 4, between)
    assert found.seconds < 0.7 * ring  # n bytes instead of 1.5 n
    assert found.between.algorithm in ALGORITHMS["all_reduce"]


def test_hosts_unlike_in_size_have_one_leader_each() -> None:
    uneven = Topology((3, 2), Path(20e-6, 10e9), (ETHERNET,))
    assert through("all_reduce", 1 << 24, uneven).form == "leader"
    assert through("all_gather", 1 << 24, uneven).form == "straight"
    assert through("broadcast", 1 << 24, uneven).form == "leader"


def test_large_tensors_use_all_ranks_of_a_host() -> None:
    slow_adds = Path(1e-4, 1.25e9, 20e-6, 2e-9)
    even = Topology((4, 4), Path(20e-6, 10e9), (slow_adds,))
    assert through("all_reduce", 1 << 26, even).form == "columns"
    assert through("all_reduce", 64, even).form == "leader"


def test_a_cost_grows_with_bytes_and_ranks() -> None:
    for collective, algorithm in PAIRS:
        if collective == "all_reduce":
            costs = [seconds(collective, algorithm, n, 8, ETHERNET) for n in (0, 1e3, 1e6, 1e9)]
            assert costs == sorted(costs)
        assert math.isfinite(seconds(collective, algorithm, 1e6, 100_000, ETHERNET))
