"""What a run exchanged and waited for, from its events: sums over ranks and starts, and any damage to the events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.observe.exchanged import counted_of, exchanged_of, exposed_of
from shardwise.observe.report import report_html
from shardwise.observe.summary import Summary, summarise
from shardwise.observe.text import summary_text
from shardwise.spec.plan import Prediction
from tests.pure.observe.story import Story

PREDICTED = {"step_s": 0.5, "peak_bytes": 1, "parts_s": {"communication": 0.1}}


def group(axis: str = "data", backend: str = "gloo", counted: int | None = 900, **operations: int) -> dict[str, Any]:
    told = {name: {"messages": 2, "bytes": nbytes, "sent": nbytes // 2} for name, nbytes in operations.items()}
    return {"axis": axis, "ranks": 2, "backend": backend, "operations": told, "counted": counted}


def story(backend: str = "gloo", counted: int | None = 900) -> Story:
    told = Story().start(steps=3, predicted=PREDICTED)
    told.tell("connected", axes=[{"axis": "data", "ranks": 2, "backend": backend}])
    told.step(1, 5.0, comm_s=9.0, seconds=10.0).step(2, 4.0, comm_s=0.2).step(3, 3.0, comm_s=0.4)
    for rank in (0, 1):
        told.tell("wire", rank=rank, groups=[group(backend=backend, counted=counted, all_reduce=2048, broadcast=4096)])
    return told.tell("run_finished", step=3, status="finished")


def summary(told: Story) -> Summary:
    return summarise(Path("r"), told.events)


def test_operations_are_summed_over_ranks_and_over_starts() -> None:
    told = story()
    told.tell("wire", rank=0, groups=[group(all_reduce=1024)])  # after a resumption
    rows = {row.operation: (row.messages, row.num_bytes, row.sent_bytes) for row in exchanged_of(told.events)}
    assert rows == {"all_reduce": (6, 5120, 2560), "broadcast": (4, 8192, 4096)}
    assert counted_of(told.events) == {"data": 2700}
    told.tell("wire", rank=1, groups=[group(counted=None)])
    assert counted_of(told.events) == {}, "a rank that did not count leaves no sum"


def test_show_tells_what_carried_each_axis_and_what_went_over_it() -> None:
    text = summary_text(summary(story()))
    assert "mesh        data: 2 ranks over gloo\n" in text
    assert (
        "exchanged   data: broadcast 4 x, 8.0 KiB, all_reduce 4 x, 4.0 KiB; 1.8 KiB sent (counted; estimate 6.0 KiB)\n"
        in text
    )
    assert "shared memory, nothing sent" in summary_text(summary(story("shm", counted=0)))
    assert "about 6.0 KiB sent (estimate)" in summary_text(summary(story("nccl", counted=None)))
    several_hosts = group(backend="hierarchical", counted=5120, all_reduce=2048)
    several_hosts["operations"]["all_reduce"]["sent"] = None
    told = Story().start().tell("wire", rank=0, groups=[several_hosts])
    assert "all_reduce 2 x, 2.0 KiB; 5.0 KiB sent (counted)" in summary_text(summary(told))


def test_exposed_communication_is_told_a_step_as_a_share_and_beside_the_predicted_one() -> None:
    found = summary(story()).exposed
    assert found is not None
    assert (found.step_s, found.share, found.predicted_s) == (pytest.approx(0.3), pytest.approx(0.3), 0.1)
    line = "exposed     300.0 ms a step waiting for other ranks, 30.0 % of the time; predicted 100.0 ms\n"
    assert line in summary_text(summary(story()))


def test_one_rank_waits_for_nobody() -> None:
    steps = [event for event in story().events if event["event"] == "step"]
    assert exposed_of(steps, None, 1) is None
    assert exposed_of([], None, 2) is None
    assert exposed_of(steps, Prediction(step_s=1, peak_bytes=1), 2) is not None
    assert exposed_of(steps, None, 2).predicted_s is None  # type: ignore[union-attr]


def test_the_report_has_a_row_for_each_operation() -> None:
    page = report_html(summary(story()), story().events, {})
    assert "<th style='text-align:left'>data</th><td style='text-align:left'>gloo</td>" in page
    assert all(word in page for word in ("all_reduce", "all, counted", "8.0 KiB", "1.8 KiB"))
    assert "Exchanged" not in report_html(summary(Story().start()), [], {})


junk = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["axis", "axes", "ranks", "backend", "groups", "operations", "counted", "bytes", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["connected", "wire", "step"]), junk, junk), max_size=5))
def test_no_events_can_break_what_is_shown(events: list[tuple[str, Any, Any]]) -> None:
    told = Story().start()
    for name, first, second in events:
        told.tell(name, axes=first, groups=second, step=1, seconds=1.0)
    found = summary(told)
    assert summary_text(found).isprintable() or "\n" in summary_text(found)
    assert report_html(found, told.events, {})
