"""Plots as inline SVG: text that any browser or notebook shows, light or dark, without a script or the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from msgspec import Struct

from shardwise.units import format_count

COLOURS = ("#3b82f6", "#f59e0b", "#ef4444", "#10b981", "#94a3b8", "#8b5cf6")  # readable on white and on black
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 34, 36
MOST_POINTS = 400
Points = Sequence[tuple[float, float]]


class Series(Struct, frozen=True, kw_only=True):
    """One line of a plot. A point whose y is not finite breaks the line. `colour` is an index into COLOURS."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    faint: bool = False
    dots: bool = False


class Frame(Struct, frozen=True, kw_only=True):
    """The data's range, and where a value of it lies in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def line_plot(title: str, series: Sequence[Series], *, x_label: str, zero: bool = False) -> str:
    """Lines over a common x; with `zero` the y axis begins at 0. Says so when no series has a finite point."""
    thinned = [(one, thin(one.points)) for one in series if one.points]
    points = [point for _, kept in thinned for point in kept if math.isfinite(point[1])]
    if not points:
        return empty_plot(title)
    frame = _frame(points, zero=zero)
    drawn = [_path(kept, one, frame) for one, kept in thinned]
    names = [(one.name, one.colour) for one, _ in thinned if one.name]
    return _picture(title, [*_axes(frame, x_label), *drawn, *_legend(names)])


def stacked_plot(title: str, xs: Sequence[float], layers: Mapping[str, Sequence[float]], *, x_label: str) -> str:
    """Layers as shares of their sum at each x, from 0 to 1, the first at the bottom."""
    columns = _columns(xs, layers)
    if not columns:
        return empty_plot(title)
    frame = _frame([(x, 0.0) for x, _ in columns] + [(columns[0][0], 1.0)], zero=True)
    parts: list[str] = []
    below = [0.0] * len(columns)
    for index, name in enumerate(layers):
        above = [low + shares[index] for low, (_, shares) in zip(below, columns, strict=True)]
        edge = [(frame.x(x), frame.y(y)) for (x, _), y in zip(columns, above, strict=True)]
        edge += [(frame.x(x), frame.y(y)) for (x, _), y in zip(reversed(columns), reversed(below), strict=True)]
        parts.append(
            f'<polygon points="{_pairs(edge)}" fill="{_colour(index)}"><title>{escape(name)}</title></polygon>'
        )
        below = above
    names = [(name, index) for index, name in enumerate(layers)]
    return _picture(title, [*parts, *_axes(frame, x_label, share=True), *_legend(names)])


def split_bar(title: str, parts: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """One horizontal bar cut into `parts` by size; `labels` is what the legend says of each."""
    total = sum(parts.values())
    if not (total > 0 and math.isfinite(total)):
        return empty_plot(title)
    drawn, at = [], float(LEFT)
    for index, (name, value) in enumerate(parts.items()):
        width = value / total * (WIDTH - LEFT - RIGHT)
        drawn.append(
            f'<rect x="{at:.1f}" y="{TOP}" width="{width:.1f}" height="26" fill="{_colour(index)}">'
            f"<title>{escape(name)} {escape(labels.get(name, ''))}</title></rect>"
        )
        at += width
    for index, name in enumerate(parts):
        x = LEFT + (index % 3) * (WIDTH - LEFT - RIGHT) / 3
        y = TOP + 48 + (index // 3) * 18
        drawn.append(_key(x, y, f"{name} {labels.get(name, '')}", index))
    return _picture(title, drawn, height=TOP + 60 + 18 * ((len(parts) - 1) // 3))


def empty_plot(title: str) -> str:
    """A picture that says that there is nothing to draw."""
    middle = f'<text x="{WIDTH / 2}" y="60" text-anchor="middle" opacity="0.6">nothing recorded yet</text>'
    return _picture(title, [middle], height=90)


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the means of equal runs of points, so that no part of the curve is left out.

    A run without a finite y stays as one point that is not finite.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    return [_mean(points[start : start + size]) for start in range(0, len(points), size)]


def smooth(points: Points) -> list[tuple[float, float]]:
    """The bias-corrected exponential mean of y (Kingma and Ba 2015, section 3); skips y that is not finite."""
    keep = 1 - 1 / max(1.5, len(points) / 80)  # averages over about an eightieth of the curve
    mean, weight = 0.0, 0.0
    found: list[tuple[float, float]] = []
    for x, y in points:
        if math.isfinite(y):
            mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
            found.append((x, mean / weight))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values within low..high, near `about` of them, each 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= raw), power * 10)
    first = math.ceil(low / step)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _mean(points: Points) -> tuple[float, float]:
    finite = [y for _, y in points if math.isfinite(y)]
    middle = points[len(points) // 2][0]
    return (middle, sum(finite) / len(finite) if finite else math.nan)


def _frame(points: Points, *, zero: bool) -> Frame:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_low, y_high = (0.0 if zero else min(ys)), max(ys)
    if not y_high > y_low:
        y_low, y_high = (0.0, 1.0) if zero else (y_low - max(0.5, abs(y_low) / 10), y_high + max(0.5, abs(y_high) / 10))
    x_low, x_high = min(xs), max(xs)
    return Frame(
        x_low=x_low, x_high=x_high if x_high > x_low else x_low + max(1.0, abs(x_low) / 1e6), y_low=y_low, y_high=y_high
    )


def _columns(xs: Sequence[float], layers: Mapping[str, Sequence[float]]) -> list[tuple[float, list[float]]]:
    """(x, share of each layer) for at most MOST_POINTS runs of x in which anything was measured."""
    size = max(1, math.ceil(len(xs) / (MOST_POINTS / 2)))
    found = []
    for start in range(0, len(xs), size):
        sums = [sum(values[start : start + size]) for values in layers.values()]
        total = sum(sums)
        if total > 0 and math.isfinite(total):
            found.append((xs[start], [value / total for value in sums]))
    return found


def _path(points: Points, series: Series, frame: Frame) -> str:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((frame.x(x), frame.y(y)))
        elif runs[-1]:
            runs.append([])
    colour = _colour(series.colour)
    style = f'stroke="{colour}" stroke-width="{1 if series.faint else 2}" opacity="{0.35 if series.faint else 1}"'
    drawn = [f'<polyline points="{_pairs(run)}" fill="none" {style}/>' for run in runs if len(run) > 1]
    alone = [run[0] for run in runs if len(run) == 1]
    dots = [at for run in runs for at in run] if series.dots else alone
    return "".join(drawn + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots])


def _axes(frame: Frame, x_label: str, *, share: bool = False) -> list[str]:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        said = f"{100 * value:.0f} %" if share else _tick_text(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity="0.15"/>'
        )
        parts.append(_tick(LEFT - 6, y + 4, "end", said))
    for value in ticks(frame.x_low, frame.x_high, 6):
        x = frame.x(value)
        parts.append(_tick(x, HEIGHT - BOTTOM + 16, "middle", _tick_text(value)))
    parts.append(_tick(WIDTH - RIGHT, HEIGHT - 4, "end", x_label))
    return parts


def _tick(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" opacity="0.75">{escape(text)}</text>'


def _tick_text(value: float) -> str:
    return format_count(value) if abs(value) >= 10_000 else f"{value:.4g}"


def _legend(names: Sequence[tuple[str, int]]) -> list[str]:
    parts, at = [], float(WIDTH - RIGHT)
    for name, colour in reversed(names):
        at -= 7 * len(name) + 26
        parts.append(_key(at, 18, name, colour))
    return parts


def _key(x: float, y: float, name: str, colour: int) -> str:
    box = f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" rx="2" fill="{_colour(colour)}"/>'
    return f'{box}<text x="{x + 15:.1f}" y="{y:.1f}">{escape(name)}</text>'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _pairs(points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _picture(title: str, parts: Sequence[str], *, height: int = HEIGHT) -> str:
    style = f'style="width:100%;max-width:{WIDTH}px;color:inherit;font:12px system-ui,sans-serif" fill="currentColor"'
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
    head = f'<text x="4" y="18" font-weight="600">{escape(title)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>{head}{"".join(parts)}</svg>'
