"""What ranks measured, as a value: it is saved and loaded, and seconds are read off it between and beyond its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shardwise.errors import SpecError
from shardwise.spec import files
from shardwise.spec.cluster import Calibration, Cluster, Device, Link, Node, Pair, typical_link

ROWS = ((1000, 1e-3), (2000, 2e-3), (10_000, 6e-3))
PAIRS = tuple(
    Pair(source=a, target=b, link=Link(latency_s=1e-5 * (1 + a), bandwidth=1e9 * (1 + b), measured=True))
    for a in range(3)
    for b in range(3)
    if a != b
)
MEASURED = Calibration(backend="gloo", ranks=3, pairs=PAIRS, collectives={"all_reduce": ROWS, "barrier": ((0, 2e-4),)})
CLUSTER = Cluster(
    nodes=(Node(devices=(Device(kind="cpu", memory_bytes=1),) * 3, link=Link(latency_s=0, bandwidth=1)),),
    calibrations=(MEASURED,),
)


def test_a_calibrated_cluster_survives_its_file(tmp_path: Path) -> None:
    files.save(CLUSTER, tmp_path / "cluster.json")
    assert files.load(tmp_path / "cluster.json", Cluster) == CLUSTER


def test_a_cluster_file_from_before_calibrations_still_loads(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text(
        '[[nodes]]\nlink = {latency_s = 1e-4, bandwidth = 1e9}\n[[nodes.devices]]\nkind = "cpu"\nmemory_bytes = 8\n'
    )
    assert files.load(tmp_path / "old.toml", Cluster).calibrations == ()


@pytest.mark.parametrize(
    ("nbytes", "seconds"),
    [(0, 1e-3), (1000, 1e-3), (1500, 1.5e-3), (2000, 2e-3), (6000, 4e-3), (10_000, 6e-3), (18_000, 10e-3)],
)
def test_seconds_lie_on_the_lines_between_the_sizes(nbytes: int, seconds: float) -> None:
    assert MEASURED.seconds("all_reduce", nbytes) == pytest.approx(seconds)


def test_what_was_not_measured_is_none_and_one_size_counts_in_proportion() -> None:
    assert MEASURED.seconds("all_gather", 5) is None
    alone = structs.replace(MEASURED, collectives={"all_reduce": ((1000, 1e-3),)})
    assert alone.seconds("all_reduce", 4000) == pytest.approx(4e-3)


sizes = st.lists(st.integers(1, 10**9), min_size=1, max_size=6, unique=True).map(sorted)


@given(sizes, st.data(), st.tuples(st.integers(0, 10**10), st.integers(0, 10**10)))
def test_more_bytes_never_take_less_time_where_none_was_measured(
    found: list[int], data: st.DataObject, asked: tuple[int, int]
) -> None:
    times = sorted(data.draw(st.lists(st.floats(1e-6, 10), min_size=len(found), max_size=len(found))))
    rows = tuple(zip(found, times, strict=True))
    one = Calibration(backend="shm", ranks=2, collectives={"all_reduce": rows})
    low, high = (one.seconds("all_reduce", nbytes) for nbytes in sorted(asked))
    assert low is not None
    assert high is not None
    assert low <= high * (1 + 1e-9)
    assert all(one.seconds("all_reduce", size) == pytest.approx(taken) for size, taken in rows)


@pytest.mark.parametrize("rows", [((2000, 1.0), (1000, 2.0)), ((1000, 1.0), (1000, 2.0))])
def test_sizes_that_do_not_rise_are_refused(rows: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(SpecError, match="sizes of collective 'all_reduce' do not rise"):
        Calibration(backend="shm", ranks=2, collectives={"all_reduce": rows})


def test_the_typical_link_is_the_median() -> None:
    assert typical_link(PAIRS) == Link(latency_s=2e-5, bandwidth=2e9, measured=True)
    assert typical_link(()) is None


def test_the_nearest_number_of_ranks_is_found() -> None:
    two = structs.replace(MEASURED, ranks=2, pairs=())
    both = structs.replace(CLUSTER, calibrations=(two, MEASURED))
    assert [found.ranks for ranks in (2, 3, 8) if (found := both.calibration(ranks))] == [2, 3, 3]
    assert structs.replace(CLUSTER, calibrations=()).calibration(2) is None


def test_the_transport_is_what_was_measured_or_what_such_machines_have() -> None:
    bare = structs.replace(CLUSTER, calibrations=())
    several = structs.replace(bare, nodes=bare.nodes * 2)
    gpus = Cluster(nodes=(structs.replace(bare.nodes[0], devices=(Device(kind="h100", memory_bytes=1),)),))
    assert [one.transport for one in (CLUSTER, bare, several, gpus)] == ["gloo", "shm", "gloo", "nccl"]
