"""Several links between two hosts at once, in network namespaces with shaped wires. Needs root."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.links import Links, unavailable
from bench.multipath import rows_of
from shardwise.comm.hierarchical import Hierarchical
from tests.ranks import Rank, RankFailed, run_ranks

WHY_NOT = unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def backend_at(rank: Rank, links: Links, interfaces: str | None, ends: str = "ab") -> Any:
    """The backend of a group whose rank r is at end `ends[r]`."""
    links.enter("ab".index(ends[rank.rank]))
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if interfaces is not None:
        os.environ["SHARDWISE_INTERFACES"] = interfaces
    group = rank.mesh().axis("data").group
    assert group is not None
    backend = group._inners["cpu"].backend
    assert isinstance(backend, Hierarchical)
    return backend


def bandwidth(rank: Rank, links: Links, interfaces: str | None, nbytes: int, rounds: int) -> dict[str, Any]:
    backend = backend_at(rank, links, interfaces)
    seconds, sent = [], []
    for _ in range(rounds):
        bucket = torch.full((nbytes // 4,), float(rank.rank + 1))
        dist.barrier()
        before = [wire.sent for wire in backend.paths.wires]
        began = time.perf_counter()
        dist.all_reduce(bucket)
        seconds.append(time.perf_counter() - began)
        sent.append([wire.sent - old for wire, old in zip(backend.paths.wires, before, strict=True)])
        assert bool((bucket == 3.0).all())
    small = [wire.sent for wire in backend.paths.wires]
    dist.all_reduce(torch.ones(8))
    small = [wire.sent - old for wire, old in zip(backend.paths.wires, small, strict=True)]
    return {"rate": nbytes / statistics.median(seconds[2:]), "sent": sent[-1], "small": small}


def test_one_bucket_uses_both_links_at_once() -> None:
    nbytes, rates = 4 << 20, (100, 50)
    with Links(rates) as links:
        found = run_ranks(2, bandwidth, links, "link0,link1", nbytes, 7)
    rows = rows_of("case", nbytes, {"shardwise": [nbytes / found[0]["rate"]]})
    assert rows[1]["median"] >= 0.9, f"{rows[1]['median']:.3f} of the links' summed bandwidth; sent {found[0]['sent']}"
    for each in found:
        fast, slow = each["sent"]
        assert fast + slow == nbytes
        assert 1.6 < fast / slow < 2.5
        assert sorted(each["small"])[0] == 0, "a small tensor takes one link"


def test_shared_networks_are_found_without_being_named() -> None:
    with Links((200, 200)) as links:
        found = run_ranks(2, bandwidth, links, None, 1 << 20, 3)
    assert all(len(each["sent"]) == 2 and min(each["sent"]) > 0 for each in found)


def missing_name(rank: Rank, links: Links) -> None:
    backend_at(rank, links, "link0,eth9")


def test_interfaces_that_do_not_match_are_refused() -> None:
    with Links((1000,)) as links:
        with pytest.raises(
            RankFailed, match="unlike numbers of interfaces on the hosts .host 0: link0; host 1: link0,lo"
        ):
            run_ranks(2, lambda rank: backend_at(rank, links, "link0,lo" if rank.rank else "link0"))
        with pytest.raises(RankFailed, match="names 'eth9', and this host has no such interface, only lo, link0"):
            run_ranks(2, missing_name, links)


def four(rank: Rank, links: Links) -> tuple[float, float, list[int]]:
    """Two ranks at each end: columns, leaders and both links."""
    backend = backend_at(rank, links, "link0,link1", ends="aabb")
    found = []
    for form in ("columns", "leader"):
        backend.form = form
        tensor = torch.full((300_001,), float(rank.rank))
        dist.all_reduce(tensor)
        found.append(float(tensor.min()) + float(tensor.max()))
    gathered = torch.empty(4 * 100_000)
    group = dist.group.WORLD
    assert group is not None
    group.all_gather_single(gathered, torch.full((100_000,), float(rank.rank))).wait()
    assert gathered.view(4, -1).unique(dim=1).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    piece = torch.empty(100_000)
    group.reduce_scatter_single(piece, torch.arange(4.0).repeat_interleave(100_000)).wait()
    assert piece.unique().tolist() == [4.0 * rank.rank]
    return found[0], found[1], [wire.sent for wire in backend.paths.wires]


def test_ranks_of_a_host_share_its_links() -> None:
    with Links((400, 200)) as links:
        for first, second, sent in run_ranks(4, four, links):
            assert first == second == 12.0
            assert min(sent) > 0


def test_namespaces_go_when_the_block_fails() -> None:
    names: tuple[str, ...] = ()
    with contextlib.suppress(ZeroDivisionError), Links((100,)) as links:
        names = links.names
        assert all(os.path.exists(f"/run/netns/{name}") for name in names)
        1 / 0  # noqa: B018
    assert names
    assert not any(os.path.exists(f"/run/netns/{name}") for name in names)
