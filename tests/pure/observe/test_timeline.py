"""Timelines: pieces cover a rank's step, waits are told from transfers, and pictures have what the events say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.observe.report import write_report
from shardwise.observe.summary import read
from shardwise.observe.text import summary_text
from shardwise.observe.timeline import KINDS, Piece, bubbles, flat, shares, timelines, typical
from shardwise.observe.timeline_plot import LEFT, RIGHT, WIDTH, coarse, timeline_plot
from tests.examples import examples
from tests.pure.observe.story import Story

SVG = "{http://www.w3.org/2000/svg}"


def told(rank: int, *, step: int = 3, start: float = 100.0, seconds: float = 10.0, **fields: Any) -> dict[str, Any]:
    """A rank's event. Times inside are in seconds here."""
    scaled = {
        "spans": [[*what, round(1e6 * at), round(1e6 * lasted)] for *what, at, lasted in fields.pop("spans", ())],
        "operations": [[*what, round(1e6 * at)] for *what, at in fields.pop("operations", ())],
        "waits": [[number, round(1e6 * at), round(1e6 * lasted)] for number, at, lasted in fields.pop("waits", ())],
    }
    groups = [{"axis": "pipeline", "ranks": [0, 1]}]
    common = {"t": 5000.0, "event": "timeline", "host": "h", "dropped": 0}
    return (
        {**common, "step": step, "rank": rank, "start": start, "seconds": seconds, "groups": groups} | scaled | fields
    )


def spent(events: list[dict[str, Any]], rank: int) -> dict[str, float]:
    """Seconds by kind, without those that are 0."""
    (step,) = timelines(events)
    (row,) = (row for row in step.rows if row.rank == rank)
    return {kind: pytest.approx(seconds, abs=1e-5) for kind, seconds in row.totals.items() if seconds > 1e-9}


@st.composite
def nested(draw: st.DrawFn, begin: int = 0, end: int = 40, depth: int = 3) -> list[Piece]:
    """Spans of one thread: beside each other or inside each other."""
    found: list[Piece] = []
    at = begin
    while at < end and draw(st.booleans()):
        first = draw(st.integers(at, end - 1))
        last = draw(st.integers(first + 1, end))
        found.append(Piece(draw(st.sampled_from(KINDS)), 0, len(found), first, last))
        if depth:
            found += draw(nested(first, last, depth - 1))
        at = last
    return found


@examples(200)
@given(nested())
def test_pieces_follow_each_other_and_the_innermost_span_counts(spans: list[Piece]) -> None:
    pieces = flat(spans, 0, 40)
    assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == 40
    by_unit = [piece.kind for piece in pieces for _ in range(int(piece.end - piece.begin))]
    for unit, kind in enumerate(by_unit):
        around = [span for span in spans if span.begin <= unit < span.end]
        shortest = min((span.end - span.begin for span in around), default=0)
        expected = {span.kind for span in around if span.end - span.begin == shortest} or {"idle"}
        assert kind in expected


def test_a_wait_is_idle_until_the_other_rank_has_sent() -> None:
    events = [
        told(0, spans=[("forward", 0, 0, 0, 4)], operations=[(0, "send", 1, 4)], waits=[(0, 4, 0.5)]),
        told(1, spans=[("forward", 1, 0, 4.5, 4)], operations=[(0, "recv", 0, 1)], waits=[(0, 1, 3.5)]),
    ]
    assert spent(events, 0) == {"forward": 4, "communication": 0.5, "idle": 5.5}
    assert spent(events, 1) == {"forward": 4, "communication": 0.5, "idle": 5.5}
    waiting = [piece[:1] + piece[3:] for piece in timelines(events)[0].rows[1].pieces[:3]]
    assert waiting == [("idle", 0, 4), ("communication", 4, 4.5), ("forward", 4.5, 8.5)]


def test_of_a_collective_only_who_came_early_was_idle() -> None:
    operation = [(0, "all_reduce", -1, 2.0)], [(0, "all_reduce", -1, 6.0)]
    events = [
        told(0, operations=operation[0], waits=[(0, 2, 5)]),
        told(1, operations=operation[1], waits=[(0, 6, 1)]),
    ]
    assert spent(events, 0) == {"communication": 1, "idle": 9}
    assert timelines(events)[0].rows[0].pieces[1] == Piece("communication", 0, 0, 6, 7)
    assert timelines(events)[0].rows[1].pieces[1] == Piece("communication", 0, 0, 6, 7)


def test_messages_between_two_ranks_meet_in_order_and_collectives_apart_from_them() -> None:
    first = [(0, "send", 1, 1), (0, "all_reduce", -1, 2), (0, "send", 1, 5)]
    second = [(0, "recv", 0, 0), (0, "recv", 0, 2), (0, "all_reduce", -1, 8)]
    events = [told(0, operations=first), told(1, operations=second, waits=[(0, 0, 2), (1, 2, 4), (2, 8, 1)])]
    pieces = timelines(events)[0].rows[1].pieces
    assert [piece[3:] for piece in pieces if piece.kind == "communication"] == [(1, 2), (5, 6), (8, 9)]


def test_an_operation_that_nobody_else_recorded_is_all_communication() -> None:
    events = [told(0, operations=[(0, "all_reduce", -1, 2)], waits=[(0, 2, 5), (-1, 8, 1)])]
    assert spent(events, 0) == {"communication": 6, "idle": 4}


def test_waits_inside_forward_are_no_forward() -> None:
    events = [told(0, spans=[("forward", 0, 0, 1, 8)], operations=[(0, "all_gather", -1, 3)], waits=[(0, 3, 2)])]
    assert spent(events, 0) == {"forward": 6, "communication": 2, "idle": 2}


def test_ranks_of_one_host_share_a_clock_and_those_of_several_the_time_of_day() -> None:
    apart = [told(0, start=100.0), told(1, start=101.0)]
    (step,) = timelines(apart)
    assert [row.pieces[0].begin for row in step.rows] == [0, 1]
    assert (step.seconds, step.hosts) == (11, 1)
    far = [told(0, start=100.0, t=5000.0), told(1, start=7.0, host="other", t=5002.0)]
    (step,) = timelines(far)
    assert [row.pieces[0].begin for row in step.rows] == [0, 2]
    assert step.hosts == 2


def pipeline(micros: int = 4) -> list[dict[str, Any]]:
    """GPipe on two stages: forward takes 1 s, backward 2 s, messages nothing."""
    back = micros + 1.0
    ranks = []
    for stage in (0, 1):
        forward = [("forward", stage, m, m + stage, 1) for m in range(micros)]
        backward = [("backward", stage, m, back + 2 * (m + 1 - stage), 2) for m in range(micros)]
        ranks.append(told(stage, seconds=back + 2 * micros + 3, spans=[*forward, *backward]))
    return ranks


@pytest.mark.parametrize("micros", [1, 4, 8])
def test_the_bubble_of_a_perfect_gpipe_is_that_of_the_paper(micros: int) -> None:
    found = timelines(pipeline(micros))
    assert found[0].staged
    assert bubbles(found) == pytest.approx({0: 1 / (micros + 1), 1: 1 / (micros + 1)})


def test_steps_that_a_resume_took_back_are_forgotten_and_nonsense_is_left_out() -> None:
    resumed = {"t": 1.0, "event": "resumed", "step": 4}
    events = [told(0, step=3), told(0, step=5, seconds=7.0), resumed, told(0, step=5, seconds=2.0)]
    wrong = [
        told(0, step=9) | {"seconds": "long"},
        told(0, step=9) | {"seconds": -1.0},
        told(0, step=9) | {"start": 1e300},
        told(0, step=9) | {"spans": [["forward", 0]]},
        told(0, step=9, waits=[(3, 0, 1)]),
        told(0, step=9) | {"operations": [[7, "send", 1, 0]]},
    ]
    found = timelines([*events, *wrong])
    assert [(step.step, step.seconds) for step in found] == [(3, 10), (5, 2)]
    chosen = typical([*found, *timelines([told(0, step=7, seconds=4.0)])])
    assert chosen is not None
    assert chosen.seconds == 4
    assert typical([]) is None


def test_shares_are_over_all_recorded_steps() -> None:
    one = told(0, step=3, spans=[("forward", 0, 0, 0, 10)])
    two = told(0, step=4, seconds=30.0, spans=[("backward", 0, 0, 0, 15)])
    assert shares(timelines([one, two]))[0] == pytest.approx(
        {"forward": 0.25, "backward": 0.375, "weights": 0, "communication": 0, "optimizer": 0, "idle": 0.375}
    )


def boxes(svg: str) -> list[tuple[float, float, str]]:
    """Left, width and tooltip of each piece that is drawn."""
    rects = [rect for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    return [(float(r.attrib["x"]), float(r.attrib["width"]), r.findtext(f"{SVG}title") or "") for r in rects]


def test_a_picture_has_a_box_for_each_piece_as_wide_as_it_was_long() -> None:
    (step,) = timelines(pipeline())
    drawn = boxes(timeline_plot(step, "<two> stages"))
    assert len(drawn) == sum(len(row.pieces) for row in step.rows)
    scale = (WIDTH - LEFT - RIGHT) / step.seconds
    for (x, width, said), piece in zip(drawn, [p for row in step.rows for p in row.pieces], strict=True):
        assert x == pytest.approx(LEFT + piece.begin * scale, abs=0.01)
        assert width == pytest.approx((piece.end - piece.begin) * scale, abs=0.01)
        assert said.startswith(piece.kind)
        assert x + width <= WIDTH - RIGHT + 0.01
    assert "bubble 20 %" in timeline_plot(step)
    assert "backward, stage 1, microbatch 3: 2.0 s" in timeline_plot(step)


@examples(100)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 500)), min_size=1, max_size=300))
def test_a_row_of_very_many_pieces_is_drawn_as_few(parts: list[tuple[str, int]]) -> None:
    pieces, at = [], 0
    for kind, lasted in parts:
        pieces.append(Piece(kind, 0, 0, at / 1e3, (at + lasted) / 1e3))
        at += lasted
    few = coarse(pieces, at / 1e3, 20)
    assert len(few) <= 21
    assert few[0].begin == 0
    assert few[-1].end == pytest.approx(at / 1e3)
    assert all(a.end == b.begin for a, b in zip(few, few[1:], strict=False))


def test_the_report_and_the_summary_have_the_timeline(tmp_path: Path) -> None:
    run = Story().start().step(1, 2.0).step(2, 1.0).write(tmp_path / "r")
    with open(run / "events.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in pipeline())
    assert "rank 1: forward 25 %, backward 50 %, idle 25 %, bubble 20 %" in summary_text(read(run))
    page = write_report(run).read_text()
    assert "<h2>Timeline</h2>" in page
    assert "other recorded steps" not in page
    picture = page[page.index("<svg", page.index("Timeline")) :].partition("</svg>")[0] + "</svg>"
    assert boxes(picture) == boxes(timeline_plot(timelines(pipeline())[0]))


ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400), st.text(max_size=3))


@examples(200)
@given(st.data())
def test_no_value_of_an_event_can_break_what_is_shown(data: st.DataObject) -> None:
    events = json.loads(json.dumps(pipeline(2)))
    place = data.draw(st.sampled_from(events))
    key: Any = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], list | dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(ANYTHING)
    found = timelines([event for event in events if isinstance(event.get("event"), str)])
    for step in found:
        ElementTree.fromstring(timeline_plot(step))
    for spent in shares(found).values():
        assert all(0 <= share < float("inf") for share in spent.values())
