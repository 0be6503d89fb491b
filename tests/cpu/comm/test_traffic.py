"""What a mesh exchanged against the kernel's own count, and how long callers waited, whoever started the operation."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from shardwise.comm.collectives import gather_rows
from shardwise.comm.kernel import library
from shardwise.comm.traffic import least_sent
from shardwise.comm.waits import Waits
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

NBYTES, TIMES = 1 << 20, 6
SLOW_S = 0.1


def exchange(rank: Rank, operation: str) -> Any:
    mesh = rank.mesh()
    group = mesh.axis("data").group
    assert group is not None
    whole = torch.zeros(NBYTES // 4 // rank.world * rank.world)
    piece = torch.zeros(NBYTES // 4 // rank.world)
    calls = {
        "all_reduce": lambda: group.all_reduce(whole),
        "broadcast": lambda: group.broadcast([whole], root=0),
        "all_gather": lambda: group.all_gather_single(whole, piece),
        "all_to_all": lambda: group.all_to_all_single(torch.empty_like(whole), whole, [], []),
        "send": lambda: group.send([whole], 1) if rank.rank == 0 else group.recv([whole], 0),
    }
    for _ in range(TIMES):
        calls[operation]().wait()
    (told,) = mesh.traffic()
    group.barrier().wait()  # nobody leaves before all have asked
    assert mesh.axes() == [{"axis": "data", "ranks": rank.world, "backend": told["backend"]}]
    return told


@pytest.mark.parametrize(("ranks", "operation"), [(2, "all_reduce"), (3, "all_reduce"), (3, "broadcast")])
def test_over_gloo_the_kernel_counts_what_the_estimate_says(
    ranks: int, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_gloo(ranks, operation, monkeypatch)


@pytest.mark.parametrize(("ranks", "operation"), [(2, "all_gather"), (3, "all_gather"), (3, "all_to_all"), (2, "send")])
def test_over_gloo_the_kernel_counts_what_the_estimate_says_of_copies(
    ranks: int, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_gloo(ranks, operation, monkeypatch)


def check_gloo(ranks: int, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", "gloo")
    told = run_ranks(ranks, exchange, operation)
    assert all(one["backend"] == "gloo" for one in told)
    assert told[0]["operations"][operation]["messages"] == TIMES
    counted = sum(one["counted"] for one in told)
    estimate = sum(counts["sent"] for one in told for counts in one["operations"].values())
    assert estimate <= counted * 1.001 <= 1.1 * estimate, "gloo's own words are few"


@pytest.mark.skipif(library() is None, reason="built without C")
def test_over_shared_memory_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", "shm")
    for one in run_ranks(2, exchange, "all_reduce"):
        assert (one["backend"], one["counted"], one["operations"]["all_reduce"]["sent"]) == ("shm", 0, 0)
        assert one["operations"]["all_reduce"]["bytes"] == TIMES * NBYTES


def test_the_estimates_are_the_least_that_must_be_sent() -> None:
    assert least_sent("all_reduce", 100, 2) == 100
    assert least_sent("all_reduce_coalesced", 100, 4) == 150
    assert least_sent("all_gather", 25, 4) == least_sent("all_to_all", 100, 4) == least_sent("reduce_scatter", 100, 4)
    assert (least_sent("send", 7, 2), least_sent("recv", 7, 2), least_sent("barrier", 0, 9)) == (7, 0, 0)


def waiting(rank: Rank) -> Any:
    """Rank 1 is late three times: for this thread, for another one, and for an operation that is not waited for."""
    mesh = rank.mesh()
    group = mesh.axis("data").group
    second = mesh.second_group("data")
    assert group is not None
    assert second is not None
    found = []

    def late(call: Any) -> None:
        group.barrier().wait()
        before = mesh.waited_s()
        if rank.rank == 1:
            time.sleep(SLOW_S)
        call()
        found.append(mesh.waited_s() - before)

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: second.barrier().wait())
        thread.start()
        thread.join()

    late(lambda: gather_rows(torch.ones(1, 2), [1] * rank.world, group))
    late(elsewhere)
    late(lambda: time.sleep(SLOW_S) if group.all_reduce(torch.ones(1)) is None else None)
    group.barrier().wait()
    return found


def test_waits_are_counted_for_the_thread_that_waits_whatever_it_waits_for() -> None:
    first, second = run_ranks(2, waiting)
    assert first[0] > SLOW_S * 0.8 > SLOW_S / 2 > second[0], "the early rank waited for the late one"
    assert max(first[1:] + second[1:]) < SLOW_S / 2, "neither another thread nor what is not waited for counts"


class Clock:
    """CUDA events on a stream whose time a test moves."""

    now_ms = 0.0
    reached_ms = 0.0

    def record(self) -> None:
        self.at = Clock.now_ms

    def query(self) -> bool:
        return self.at <= Clock.reached_ms

    def elapsed_time(self, end: Clock) -> float:
        return end.at - self.at


def test_what_a_stream_stalls_counts_once_the_stream_has_come_so_far() -> None:
    waits = Waits(event=Clock)
    for stall_ms in (5.0, 7.0):
        with waits.on_stream():
            Clock.now_ms += stall_ms
    assert waits.seconds() == 0.0
    Clock.reached_ms = 5.0
    assert waits.seconds() == pytest.approx(5e-3)
    Clock.reached_ms = 12.0
    assert waits.seconds() == waits.seconds() == pytest.approx(12e-3)


def alone(rank: Rank) -> Any:
    mesh = rank.mesh(Plan())
    return mesh.axes(), mesh.traffic(), mesh.waited_s()


def test_one_rank_exchanges_nothing() -> None:
    assert run_ranks(1, alone) == [([], [], 0)]
