"""One picture a benchmark: a dot for each median and a line for its range or interval, as an SVG file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from bench.rows import Row, number
from shardwise.observe.svg import COLOURS, ticks

WIDTH, LEFT, RIGHT, LINE, TOP = 720, 210, 24, 20, 34
GREY = "#7d8590"  # readable on white and on black
OURS = "shardwise"


def dots(title: str, rows: Sequence[Row]) -> str:
    """Rows of one metric, under a heading for each case; the axis begins at 0. A row that hung has an arrow instead."""
    shown = [each for each in rows if each["median"] is not None]
    highest = max((_reach(each) for each in shown), default=0.0) or 1.0
    unit = shown[0]["unit"] if shown else ""
    parts: list[str] = []
    y = float(TOP)
    case = None
    for each in shown:
        if each["case"] != case:
            case = each["case"]
            y += LINE * 0.6
            parts.append(_text(12, y, "start", case, weight="bold"))
            y += LINE
        parts += _line(each, y, highest)
        y += LINE
    bottom = y - LINE * 0.4
    axis = _axis(highest, bottom, unit, reference=bool(shown) and shown[0]["metric"].startswith("ratio_to_"))
    return _picture(title, [*axis, *parts], bottom + 30)


def _reach(each: Row) -> float:
    values = [each["median"], each.get("high") or 0.0, *(each["values"] if each.get("high") is None else [])]
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _x(value: float, highest: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * 0.98 * value / highest


def _line(each: Row, y: float, highest: float) -> list[str]:
    colour = COLOURS[0] if each["system"].startswith(OURS) else COLOURS[4]
    parts = [_text(LEFT - 10, y + 4, "end", each["system"])]
    if not math.isfinite(each["median"]):
        return [*parts, _text(WIDTH - RIGHT, y + 4, "end", "hung \u2192".encode("ascii", "xmlcharrefreplace").decode())]
    finite = [value for value in each["values"] if math.isfinite(value)]
    low, high = each.get("low", min(finite)), each.get("high", max(finite))
    said = f"{each['system']}: {number(each['median'])} {each['unit']} ({number(low)} to {number(high)})"
    reach = min(high, highest)
    parts.append(
        f'<g stroke="{colour}" fill="{colour}"><title>{escape(said)}</title>'
        f'<line x1="{_x(low, highest):.1f}" x2="{_x(reach, highest):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke-width="2"/>'
        f'<circle cx="{_x(each["median"], highest):.1f}" cy="{y:.1f}" r="4.5"/></g>'
    )
    return parts


def _axis(highest: float, bottom: float, unit: str, *, reference: bool) -> list[str]:
    parts = []
    for value in ticks(0.0, highest):
        x = _x(value, highest)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}" stroke="{GREY}" stroke-opacity="0.25"/>'
        )
        parts.append(_text(x, bottom + 16, "middle", number(value)))
    parts.append(_text(WIDTH - RIGHT, TOP - 6, "end", unit))
    if reference:
        x = _x(1.0, highest)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}" stroke="{GREY}" stroke-width="1.5"/>'
        )
    return parts


def _text(x: float, y: float, anchor: str, text: str, *, weight: str = "normal") -> str:
    said = text if "&#" in text else escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{GREY}">{said}</text>'


def _picture(title: str, parts: Sequence[str], height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" role="img">'
    )
    name = _text(12, 18, "start", title, weight="bold")
    return "\n".join([head, f"<title>{escape(title)}</title>", name, *parts, "</svg>", ""])
