"""What each rank did in a recorded step, and when: from the `timeline` events of a run alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct

from shardwise.events import Event
from shardwise.observe.history import LARGEST, whole

COMPUTING = ("forward", "backward", "weights")
KINDS = (*COMPUTING, "communication", "optimizer", "idle")
NAMES = {"weights": "weight gradients"}


class Piece(NamedTuple):
    """Seconds `begin` to `end` of a rank's step, counted from where the first rank began it. Where nothing is computed
    `stage` and `micro` are 0."""

    kind: str
    stage: int
    micro: int
    begin: float
    end: float


class Row(Struct, frozen=True, kw_only=True):
    """A rank's step: pieces without a gap between them, their seconds by kind, and how long it was in all.

    `idle` is the rest: above all waiting for what others had not sent yet, and what no span claimed. `bubble` is the
    share of the time between the first forward and the last backward of any rank in which this one computed neither.
    """

    rank: int
    pieces: tuple[Piece, ...]
    seconds: float
    totals: dict[str, float]
    bubble: float


class StepTimeline(Struct, frozen=True, kw_only=True):
    """One step on all ranks that recorded it. `staged`: the model was cut into stages.

    Ranks of several hosts are placed by the hosts' wall clocks, those of one host by the clock that they share.
    """

    step: int
    seconds: float
    rows: tuple[Row, ...]
    staged: bool
    hosts: int


class Spent(Struct, frozen=True, kw_only=True):
    """Of the recorded steps of a run, by rank: see `shares` and `bubbles`."""

    shares: dict[int, dict[str, float]]
    bubbles: dict[int, float]


class _Line(Struct, frozen=True):
    """A `group` of a `timeline` event: the axis and the ranks on it."""

    axis: str
    ranks: list[int]


class _Recorded(Struct, frozen=True):
    """A `timeline` event: see `Timeline` of comm."""

    t: float
    step: int
    rank: int
    host: str
    start: float
    seconds: float
    groups: list[_Line]
    spans: list[tuple[str, int, int, float, float]]
    operations: list[tuple[int, str, int, float]]
    waits: list[tuple[int, float, float]]


Meeting = tuple[object, ...]  # what tells an operation, or a message, from all others of the step


def timelines(found: Sequence[Event]) -> list[StepTimeline]:
    """Each recorded step that stands, in order; lines that are cut short or say nonsense are left out."""
    kept: dict[int, dict[int, _Recorded]] = {}
    for event in found:
        if event["event"] == "resumed" and (at := whole(event, "step")) is not None:
            kept = {step: ranks for step, ranks in kept.items() if step <= at}
        elif event["event"] == "timeline" and (one := _recorded(event)) is not None:
            kept.setdefault(one.step, {})[one.rank] = one
    return [_together(step, [kept[step][rank] for rank in sorted(kept[step])]) for step in sorted(kept)]


def typical(steps: Sequence[StepTimeline]) -> StepTimeline | None:
    """The one whose length is the median's; None where there is none."""
    return sorted(steps, key=lambda one: one.seconds)[(len(steps) - 1) // 2] if steps else None


def shares(steps: Sequence[StepTimeline]) -> dict[int, dict[str, float]]:
    """For each rank, what share of its recorded steps was spent on what, in the order of KINDS."""
    rows: dict[int, list[Row]] = {}
    for step in steps:
        for row in step.rows:
            rows.setdefault(row.rank, []).append(row)
    found = {}
    for rank in sorted(rows):
        spent = sum(row.seconds for row in rows[rank])
        totals = {kind: sum(row.totals[kind] for row in rows[rank]) for kind in KINDS}
        found[rank] = {kind: seconds / spent for kind, seconds in totals.items()} if spent else {}
    return found


def bubbles(steps: Sequence[StepTimeline]) -> dict[int, float]:
    """The median of each rank's bubble over the recorded steps, where the model was cut into stages."""
    found: dict[int, list[float]] = {}
    for step in steps:
        for row in step.rows if step.staged else ():
            found.setdefault(row.rank, []).append(row.bubble)
    return {rank: statistics.median(values) for rank, values in sorted(found.items())}


def spent_of(found: Sequence[Event]) -> Spent:
    """What the recorded steps of a run were spent on."""
    steps = timelines(found)
    return Spent(shares=shares(steps), bubbles=bubbles(steps))


def flat(spans: Sequence[Piece], begin: float, end: float) -> list[Piece]:
    """The same as pieces that follow each other from `begin` to `end`: of spans inside each other the innermost counts,
    and what none of them claims is idle."""
    pieces: list[Piece] = []
    stack: list[Piece] = []
    at = begin

    def upto(moment: float) -> None:
        nonlocal at
        moment = min(max(moment, at), end)
        if moment > at:
            top = stack[-1] if stack else Piece("idle", 0, 0, 0.0, 0.0)
            if pieces and pieces[-1][:3] == top[:3]:
                pieces[-1] = pieces[-1]._replace(end=moment)
            else:
                pieces.append(top._replace(begin=at, end=moment))
        at = moment

    for span in sorted(spans, key=lambda one: (one.begin, -one.end)):
        while stack and stack[-1].end <= span.begin:
            upto(stack[-1].end)
            stack.pop()
        upto(span.begin)
        stack.append(span)
    while stack:
        upto(stack[-1].end)
        stack.pop()
    upto(end)
    return pieces


def _recorded(event: Event) -> _Recorded | None:
    try:
        one = msgspec.convert(event, _Recorded)
    except msgspec.ValidationError:
        return None
    numbers = [one.t, one.start, one.seconds]
    numbers += [value for row in (*one.spans, *one.operations, *one.waits) for value in row if isinstance(value, float)]
    right = all(abs(value) <= LARGEST for value in numbers) and min(one.step, one.rank) >= 0 < one.seconds
    places = all(0 <= group < len(one.groups) for group, *_ in one.operations)
    return one if right and places and all(-1 <= number < len(one.operations) for number, *_ in one.waits) else None


def _together(step: int, ranks: Sequence[_Recorded]) -> StepTimeline:
    hosts = len({one.host for one in ranks})
    origins = {one.rank: one.start if hosts == 1 else one.t - one.seconds for one in ranks}
    first = min(origins.values())
    origins = {rank: origin - first for rank, origin in origins.items()}
    began = _began(ranks, origins)
    pieces = {one.rank: _pieces(one, origins[one.rank], began) for one in ranks}
    computed = [piece for row in pieces.values() for piece in row if piece.kind in COMPUTING]
    window = max((p.end for p in computed), default=0.0) - min((p.begin for p in computed), default=0.0)
    return StepTimeline(
        step=step,
        seconds=max(origins[one.rank] + one.seconds for one in ranks),
        rows=tuple(_row(one, pieces[one.rank], window) for one in ranks),
        staged=any(piece.stage for piece in computed),
        hosts=hosts,
    )


def _row(one: _Recorded, pieces: Sequence[Piece], window: float) -> Row:
    totals = {kind: math.fsum(p.end - p.begin for p in pieces if p.kind == kind) for kind in KINDS}
    computed = sum(totals[kind] for kind in COMPUTING)
    bubble = max(0.0, 1 - computed / window) if window > 0 else 0.0
    return Row(rank=one.rank, pieces=tuple(pieces), seconds=one.seconds, totals=totals, bubble=bubble)


def _pieces(one: _Recorded, origin: float, began: Mapping[Meeting, Mapping[int, float]]) -> list[Piece]:
    spans = [
        Piece(kind if kind in KINDS else "idle", stage, micro, origin + at / 1e6, origin + (at + lasted) / 1e6)
        for kind, stage, micro, at, lasted in one.spans
    ]
    meetings = _meetings(one)
    for number, at, lasted in one.waits:
        begin, end = origin + at / 1e6, origin + (at + lasted) / 1e6
        ready = _ready(meetings[number], one, began) if number >= 0 else None
        ready = begin if ready is None or ready >= end else max(begin, ready)
        spans.append(Piece("idle", 0, 0, begin, ready))
        spans.append(Piece("communication", 0, 0, ready, end))
    return flat([span for span in spans if span.end > span.begin], origin, origin + one.seconds)


def _meetings(one: _Recorded) -> list[Meeting]:
    """What each operation is to all ranks that take part: messages between two ranks are in order, collectives too."""
    found: list[Meeting] = []
    counts: dict[Meeting, int] = {}
    for group, op, peer, _ in one.operations:
        line = (one.groups[group].axis, *one.groups[group].ranks)
        ends = {"send": (one.rank, peer), "recv": (peer, one.rank)}.get(op, ())
        number = counts[line, ends] = counts.get((line, ends), -1) + 1
        found.append((line, ends, number))
    return found


def _began(ranks: Sequence[_Recorded], origins: Mapping[int, float]) -> dict[Meeting, dict[int, float]]:
    """When each rank began each operation."""
    found: dict[Meeting, dict[int, float]] = {}
    for one in ranks:
        for meeting, (_, _, _, at) in zip(_meetings(one), one.operations, strict=True):
            found.setdefault(meeting, {})[one.rank] = origins[one.rank] + at / 1e6
    return found


def _ready(meeting: Meeting, one: _Recorded, began: Mapping[Meeting, Mapping[int, float]]) -> float | None:
    """When the last of the others had begun it too; None where nobody else recorded it."""
    return max((at for rank, at in began[meeting].items() if rank != one.rank), default=None)
