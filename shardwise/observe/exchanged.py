"""What the ranks of a run exchanged, axis by axis, and how long its steps waited for it: from the events alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from shardwise.events import Event
from shardwise.observe.history import amount, named, whole, word
from shardwise.spec.plan import Prediction
from shardwise.units import format_bytes, format_seconds


class Exchanged(Struct, frozen=True, kw_only=True):
    """An operation on one axis, over all ranks: calls, bytes handed to `backend`, bytes sent by estimate."""

    axis: str
    backend: str
    operation: str
    messages: int
    num_bytes: int
    sent_bytes: int


class Axis(Struct, frozen=True, kw_only=True):
    """An axis of the mesh, and what carries its messages."""

    name: str
    ranks: int
    backend: str


class Exposed(Struct, frozen=True, kw_only=True):
    """Communication that nothing hid: the median seconds of a step but the first, and its share of all their time."""

    step_s: float
    share: float
    predicted_s: float | None = None


def axes_of(found: Sequence[Event]) -> tuple[Axis, ...]:
    """The axes as the mesh was connected last."""
    connected = named(found, "connected")
    return tuple(
        Axis(name=word(axis, "axis"), ranks=whole(axis, "ranks") or 0, backend=word(axis, "backend"))
        for axis in (_mappings(connected[-1].get("axes")) if connected else ())
    )


def counted_of(found: Sequence[Event]) -> dict[str, int]:
    """Bytes that were sent for each axis over all ranks; without the axes where one did not count."""
    counted: dict[str, int] = {}
    unknown: set[str] = set()
    for group in _groups(found):
        axis, sent = word(group, "axis"), whole(group, "counted")
        counted[axis] = counted.get(axis, 0) + (sent or 0)
        unknown |= {axis} if sent is None else set()
    return {axis: sent for axis, sent in counted.items() if axis not in unknown}


def exchanged_of(found: Sequence[Event]) -> tuple[Exchanged, ...]:
    """Each operation on each axis, summed over the ranks and over the starts that ended in order."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for group in _groups(found):
        operations = group.get("operations")
        for operation, counts in operations.items() if isinstance(operations, dict) else ():
            if isinstance(counts, dict):
                place = (word(group, "axis"), word(group, "backend"), word({"operation": operation}, "operation"))
                row = sums.setdefault(place, [0, 0, 0])
                for index, key in enumerate(("messages", "bytes", "sent")):
                    row[index] += whole(counts, key) or 0
    return tuple(
        Exchanged(axis=axis, backend=backend, operation=operation, messages=row[0], num_bytes=row[1], sent_bytes=row[2])
        for (axis, backend, operation), row in sums.items()
    )


def exposed_of(steps: Sequence[Event], predicted: Prediction | None, ranks: int | None) -> Exposed | None:
    """None for a run of one rank, and without steps. The first step warms up."""
    warm = [step for step in (steps[1:] or steps) if amount(step, "seconds") > 0]
    if not warm or (ranks or 1) < 2:
        return None
    return Exposed(
        step_s=statistics.median(amount(step, "comm_s") for step in warm),
        share=sum(amount(step, "comm_s") for step in warm) / sum(amount(step, "seconds") for step in warm),
        predicted_s=predicted.parts_s.get("communication") if predicted else None,
    )


def axes_text(axes: Sequence[Axis]) -> str:
    """`data: 2 ranks over shm`."""
    return ", ".join(f"{axis.name}: {axis.ranks} ranks over {axis.backend}" for axis in axes)


def exposed_text(exposed: Exposed) -> str:
    """`2.1 ms a step waiting for other ranks, 3 % of the time; predicted 1.8 ms`."""
    share = f"{100 * exposed.share:.1f} % of the time"
    expected = "" if exposed.predicted_s is None else f"; predicted {format_seconds(exposed.predicted_s)}"
    return f"{format_seconds(exposed.step_s)} a step waiting for other ranks, {share}{expected}"


def exchanged_lines(exchanged: Sequence[Exchanged], counted: Mapping[str, int]) -> list[str]:
    """A line for each axis: its operations, the most bytes first, and what of them went over a wire."""
    lines = []
    for axis, backend in dict.fromkeys((row.axis, row.backend) for row in exchanged):
        rows = [row for row in exchanged if (row.axis, row.backend) == (axis, backend)]
        rows.sort(key=lambda row: -row.num_bytes)
        told = ", ".join(f"{row.operation} {row.messages} x, {format_bytes(row.num_bytes)}" for row in rows)
        lines.append(f"{axis}: {told}; {_wire_text(sum(row.sent_bytes for row in rows), backend, counted.get(axis))}")
    return lines


def _wire_text(estimate: int, backend: str, counted: int | None) -> str:
    if backend in ("shm", "shm-torch"):
        return "shared memory, nothing sent"
    if counted is None:
        return f"about {format_bytes(estimate)} sent (estimate)" if estimate else "nobody counted what was sent"
    return f"{format_bytes(counted)} sent (counted{f'; estimate {format_bytes(estimate)}' if estimate else ''})"


def _groups(found: Sequence[Event]) -> list[dict[str, Any]]:
    return [group for event in named(found, "wire") for group in _mappings(event.get("groups"))]


def _mappings(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
