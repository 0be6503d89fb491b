"""A rank's record of a step: what it did, began and waited for in the block, and nothing of anybody else."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from shardwise.comm import timeline
from shardwise.comm.mesh import Mesh, connect
from shardwise.comm.timeline import NO_PEER, OFF, StreamClock
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

LATE_S = 0.1


def alone() -> Mesh:
    return connect(Plan(), rank=0, world=1, store=None)


def test_spans_cost_nothing_that_is_kept_while_no_step_is_recorded() -> None:
    mesh = alone()
    assert mesh.timeline.span("forward") is OFF
    with mesh.timeline.span("forward"):
        pass
    with mesh.recording() as told:
        pass
    assert told()["spans"] == []


def test_there_is_an_end_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 3)
    mesh = alone()
    with mesh.recording() as told:
        for micro in range(5):
            with mesh.timeline.span("forward", 0, micro):
                pass
    assert [span[:3] for span in told()["spans"]] == [["forward", 0, micro] for micro in range(3)]
    assert told()["dropped"] == 2


def recorded(rank: Rank) -> Any:
    """Rank 1 is late for an all-reduce; then rank 0 sends. Another thread of each uses the group as well."""
    mesh = rank.mesh(Plan(pipeline=2))
    group = mesh.axis("pipeline").group
    assert group is not None
    early = group.all_reduce(torch.ones(1))
    with mesh.recording() as told:
        early.wait()
        if rank.rank == 1:
            time.sleep(LATE_S)
        group.all_reduce(torch.ones(4)).wait()
        message = torch.ones(2)
        (group.send([message], 1) if rank.rank == 0 else group.recv([message], 0)).wait()
        other = threading.Thread(target=lambda: group.all_reduce(torch.ones(1)).wait())
        other.start()
        other.join()
    group.all_reduce(torch.ones(1)).wait()  # after the block
    return told()


def test_operations_and_waits_of_this_thread_are_recorded_in_order() -> None:
    first, second = run_ranks(2, recorded)
    assert first["groups"] == second["groups"] == [{"axis": "pipeline", "ranks": [0, 1]}]
    assert [one[:3] for one in first["operations"]] == [[0, "all_reduce", NO_PEER], [0, "send", 1]]
    assert [one[:3] for one in second["operations"]] == [[0, "all_reduce", NO_PEER], [0, "recv", 0]]
    for told in (first, second):
        numbers = [number for number, _, _ in told["waits"]]
        assert numbers == sorted(numbers)
        assert set(numbers) <= {-1, 0, 1}
        assert all(at >= told["operations"][number][3] for number, at, _ in told["waits"] if number >= 0)
    waited = sum(lasted for number, _, lasted in first["waits"] if number == 0)
    assert waited > 0.8e6 * LATE_S
    assert sum(lasted for number, _, lasted in second["waits"] if number == 0) < waited
    begun = [told["start"] + told["operations"][0][3] / 1e6 for told in (first, second)]
    assert begun[1] - begun[0] > 0.8 * LATE_S, "one clock for all ranks of a host"


class Moment:
    """In the place of a CUDA event: the stream is `behind` seconds late."""

    behind = 0.5

    def record(self) -> None:
        self.at = time.perf_counter() + self.behind

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: Moment) -> float:
        return 1e3 * (other.at - self.at)


def test_on_a_stream_moments_are_the_streams() -> None:
    clock = StreamClock(Moment)
    began = clock.mark()
    time.sleep(0.02)
    ended = clock.mark()
    assert clock.seconds(ended) - clock.seconds(began) == pytest.approx(ended.at - began.at)
    assert clock.seconds(began) == pytest.approx(time.perf_counter(), abs=1.0)
    assert clock.seconds(7.5) == 7.5, "a wait of the host"
