"""The clocks of a parameter server, drawn: what each worker computed when, and when the server updated."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, TOP, ROW = 640, 74, 40, 30
AGES = ("#10b981", "#f59e0b", "#ef4444")  # gradients of parameters that were 0, 1, 2 or more updates old
GIVEN_UP = "#94a3b8"


class Box(NamedTuple):
    """A worker's gradient of `clock`, computed from `start` to `end` after a wait that began at `asked`.

    `behind`: how many updates were made to the parameters in the meantime, before this gradient was used; -1 if it
    never was.
    """

    worker: int
    clock: int
    asked: float
    start: float
    end: float
    behind: int


def timeline(title: str, boxes: Sequence[Box], updates: Sequence[tuple[float, int]], until: float) -> str:
    """A row for each worker and one for the server, which updates at `updates` (when, which clock)."""
    workers = 1 + max(box.worker for box in boxes)
    scale = (WIDTH - LEFT - 12) / until
    server = TOP + workers * ROW
    parts = [_text(LEFT - 10, TOP + w * ROW + 18, f"worker {w}", "end") for w in range(workers)]
    parts.append(_text(LEFT - 10, server + 18, "server", "end"))
    for box in boxes:
        parts += _box(box, TOP + box.worker * ROW, scale, until)
    for when, clock in {when: clock for when, clock in updates if when <= until}.items():  # of several at once the last
        parts.append(_update(LEFT + when * scale, server, clock))
    height = server + ROW + 22
    names = ["parameters up to date", "1 update old", "2 or more", "not used (yet)"]
    at = LEFT
    for name, colour in zip(names, [*AGES, GIVEN_UP], strict=True):
        parts.append(f'<rect x="{at}" y="{height - 16}" width="10" height="10" rx="2" fill="{colour}"/>')
        parts.append(_text(at + 15, height - 7, name, "start"))
        at += 7 * len(name) + 34
    style = f'style="width:100%;max-width:{WIDTH}px;color:inherit;font:12px system-ui,sans-serif" fill="currentColor"'
    view = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
    head = f'<text x="4" y="18" font-weight="600">{escape(title)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view} {style}>{head}{"".join(parts)}</svg>'


def _box(box: Box, y: float, scale: float, until: float) -> list[str]:
    """The wait as a thin line, the computation as a box with the clock's number."""
    asked, start, end = (LEFT + min(when, until) * scale for when in (box.asked, box.start, box.end))
    parts = []
    if start > asked:
        middle = y + ROW / 2 - 1
        ends = f'x1="{asked:.1f}" y1="{middle:.1f}" x2="{start - 1:.1f}" y2="{middle:.1f}"'
        parts.append(f'<line {ends} stroke="currentColor" opacity="0.6" stroke-dasharray="2 3"/>')
    if end > start:
        colour = GIVEN_UP if box.behind < 0 else AGES[min(box.behind, 2)]
        place = f'x="{start + 1:.1f}" y="{y + 4}" width="{end - start - 2:.1f}" height="{ROW - 10}" rx="3"'
        parts.append(f'<rect {place} fill="{colour}" opacity="0.85"/>')
        if box.end <= until:
            parts.append(_text((start + end) / 2, y + 18, str(box.clock), "middle"))
    return parts


def _update(x: float, y: float, clock: int) -> str:
    mark = f'<path d="M{x:.1f},{y + 3} v8 m-3,-3 l3,4 l3,-4" fill="none" stroke="currentColor"/>'
    return mark + _text(x, y + 25, str(clock), "middle")


def _text(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" opacity="0.85">{escape(said)}</text>'
