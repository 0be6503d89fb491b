"""What a calibration leaves for later runs: kept by machine and backend, found by discover, a cluster of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from shardwise.cluster.discover import cpu_model, discover, usable_cores
from shardwise.cluster.links import cluster_of, keep, kept, link_of
from shardwise.cluster.probe import machine_key
from shardwise.errors import ClusterError
from shardwise.spec.cluster import TRANSPORTS, Calibration, Device, Link, Node, Pair


def calibration(ranks: int = 2, backend: str = "shm", latency_s: float = 1e-5) -> Calibration:
    pairs = tuple(
        Pair(source=a, target=b, link=Link(latency_s=latency_s, bandwidth=4e9, measured=True))
        for a in range(ranks)
        for b in range(ranks)
        if a != b
    )
    return Calibration(backend=backend, ranks=ranks, pairs=pairs, collectives={"all_reduce": ((4, 1e-5),)})


def test_what_was_kept_is_found_by_machine_and_backend(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cluster.json"
    for one in (calibration(4), calibration(2), calibration(2, "gloo")):
        written = keep("mine", one, cache=cache)
    assert written == tmp_path / "deep" / "links.json"
    assert kept("mine", "shm", cache=cache) == (calibration(2), calibration(4))
    assert kept("mine", "gloo", cache=cache) == (calibration(2, "gloo"),)
    assert kept("another", "shm", cache=cache) == ()


def test_a_second_measurement_takes_the_place_of_the_first(tmp_path: Path) -> None:
    cache = tmp_path / "cluster.json"
    keep("mine", calibration(2), cache=cache)
    keep("mine", calibration(2, latency_s=2e-5), cache=cache)
    assert kept("mine", "shm", cache=cache) == (calibration(2, latency_s=2e-5),)


@pytest.mark.parametrize("raw", ["", "[]", "{", '{"mine": 3}', '{"mine": [{"backend": "shm"}]}', "\x00"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, raw: str) -> None:
    (tmp_path / "links.json").write_text(raw)
    assert kept("mine", "shm", cache=tmp_path / "cluster.json") == ()
    keep("mine", calibration(), cache=tmp_path / "cluster.json")
    assert kept("mine", "shm", cache=tmp_path / "cluster.json") == (calibration(),)


def test_where_nothing_can_be_kept_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="--out FILE"):
        keep("mine", calibration(), cache=tmp_path / "file" / "cluster.json")


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_discover_brings_what_was_measured_over_the_transport_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr("shardwise.cluster.discover.find_gpus", lambda: [])
    monkeypatch.setenv("SHARDWISE_TRANSPORT", transport)
    cache = tmp_path / "cluster.json"
    machine = machine_key(cpu_model(), usable_cores(), [])
    before = discover(probe=False, cache=cache)
    assert (before.calibrations, before.nodes[0].link) == ((), TRANSPORTS[transport].link)
    keep(machine, calibration(2, "shm", 1e-6), cache=cache)
    keep(machine, calibration(2, "gloo", 1e-3), cache=cache)
    found = discover(probe=False, cache=cache)
    assert [one.backend for one in found.calibrations] == [transport]
    assert found.nodes[0].link == Link(latency_s=1e-6 if transport == "shm" else 1e-3, bandwidth=4e9, measured=True)


def test_the_link_is_that_of_the_most_ranks() -> None:
    several = (calibration(2, latency_s=1.0), calibration(4, latency_s=2.0))
    assert link_of(several, "shm").latency_s == 2.0
    assert link_of((), "nccl") == TRANSPORTS["nccl"].link


def test_ranks_on_two_hosts_are_two_nodes_with_links_inside_and_between() -> None:
    device = Device(kind="cpu", memory_bytes=1)
    a, b = (Node(devices=(device,), link=Link(latency_s=9, bandwidth=9), name=name) for name in ("a", "b"))
    near, far = Link(latency_s=1e-6, bandwidth=1e10, measured=True), Link(latency_s=1e-3, bandwidth=1e8, measured=True)
    hosts = "aab"
    pairs = tuple(
        Pair(source=i, target=j, link=near if hosts[i] == hosts[j] else far)
        for i in range(3)
        for j in range(3)
        if i != j
    )
    measured = structs.replace(calibration(3, "gloo"), pairs=pairs)
    found = cluster_of([a, a, b], measured)
    assert [node.name for node in found.nodes] == ["a", "b"]
    assert (found.nodes[0].link, found.nodes[1].link, found.between) == (near, b.link, far)
    assert (found.link, found.calibrations) == (far, (measured,))
    assert cluster_of([a, a], calibration(2)).link == calibration(2).pairs[0].link
