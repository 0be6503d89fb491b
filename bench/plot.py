"""One picture a benchmark: a dot for each median and a line for its range or interval, as an SVG file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.rows import Row, number
from shardwise.observe.svg import COLOURS, ticks

WIDTH, LEFT, RIGHT, LINE, TOP = 720, 210, 24, 20, 34
GREY = "#7d8590"  # readable on white and on black
OURS = "shardwise"
WIDE = 50


@dataclass(frozen=True)
class Axis:
    """The values at the left and the right end of the picture; between them equal steps or, if `log`, equal factors."""

    low: float
    high: float
    log: bool = False

    def x(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, self.clipped(value)))
        return LEFT + (WIDTH - LEFT - RIGHT) * (at - low) / (high - low)

    def clipped(self, value: float) -> float:
        """A value that is not beyond the ends; a logarithmic axis has no 0."""
        return min(max(value, self.low), self.high)

    def ticks(self) -> list[float]:
        if not self.log:
            return list(ticks(self.low, self.high))
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**power for power in range(first, last + 1)]


def dots(title: str, rows: Sequence[Row]) -> str:
    """Rows of one metric, under a heading for each case. A row that hung says so.

    The axis begins at 0, that of ratios near the smallest; theirs has a line at 1. Where medians of something else
    differ by more than `WIDE` it is logarithmic.
    """
    shown = [each for each in rows if each["median"] is not None]
    is_ratio = bool(shown) and shown[0]["metric"].startswith("ratio_to_")
    axis = _axis(shown, is_ratio=is_ratio)
    parts: list[str] = []
    y = float(TOP)
    case = None
    for each in shown:
        if each["case"] != case:
            case = each["case"]
            y += LINE * 0.6
            parts.append(_text(12, y, "start", case, weight="bold"))
            y += LINE
        parts += _line(each, y, axis)
        y += LINE
    bottom = y - LINE * 0.4
    grid = _grid(axis, bottom, shown[0]["unit"] if shown else "", is_ratio=is_ratio)
    return _picture(title, [*grid, *parts], bottom + 30)


def _axis(rows: Sequence[Row], *, is_ratio: bool) -> Axis:
    ends = [value for each in rows for value in (*_spread(each), each["median"]) if math.isfinite(value)]
    if is_ratio:
        ends.append(1.0)
    low = min(ends, default=0.0) if is_ratio else 0.0
    high = max(ends, default=1.0)
    positive = [value for value in ends if value > 0]
    if not is_ratio and positive and high > WIDE * min(positive):
        return Axis(min(positive) / 1.1, high * 1.1, log=True)
    if not high > low:
        low, high = 0.0, max(high, 1.0)
    margin = 0.04 * (high - low)
    return Axis(low - margin if low > 0 else 0.0, high + margin)


def _spread(each: Row) -> tuple[float, float]:
    """The interval of a row, or the range of its values that are finite."""
    if each.get("low") is not None:
        return each["low"], each["high"]
    finite = [value for value in each["values"] if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (math.inf, math.inf)


def _line(each: Row, y: float, axis: Axis) -> list[str]:
    colour = COLOURS[0] if each["system"].startswith(OURS) else COLOURS[4]
    parts = [_text(LEFT - 10, y + 4, "end", each["system"])]
    if not math.isfinite(each["median"]):
        return [*parts, _text(WIDTH - RIGHT, y + 4, "end", "hung or failed")]
    low, high = _spread(each)
    said = f"{each['system']}: {number(each['median'])} {each['unit']} ({number(low)} to {number(high)})"
    return [
        *parts,
        f'<g stroke="{colour}" fill="{colour}"><title>{escape(said)}</title>'
        f'<line x1="{axis.x(low):.1f}" x2="{axis.x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke-width="2"/>'
        f'<circle cx="{axis.x(each["median"]):.1f}" cy="{y:.1f}" r="4.5"/></g>',
    ]


def _grid(axis: Axis, bottom: float, unit: str, *, is_ratio: bool) -> list[str]:
    parts = [_text(WIDTH - RIGHT, TOP - 6, "end", unit)]
    for value in axis.ticks():
        x = axis.x(value)
        thick = 'stroke-width="1.5"' if is_ratio and abs(value - 1.0) < 1e-9 else 'stroke-opacity="0.25"'
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}" stroke="{GREY}" {thick}/>')
        parts.append(_text(x, bottom + 16, "middle", number(round(value, 9))))
    return parts


def _text(x: float, y: float, anchor: str, text: str, *, weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="{GREY}">{escape(text)}</text>'


def _picture(title: str, parts: Sequence[str], height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" role="img">'
    )
    name = _text(12, 18, "start", title, weight="bold")
    return "\n".join([head, f"<title>{escape(title)}</title>", name, *parts, "</svg>", ""])
