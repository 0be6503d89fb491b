"""Plots: every picture is well-formed, what is drawn lies inside it, ticks are round."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from shardwise.observe.svg import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Series,
    line_plot,
    smooth,
    split_bar,
    stacked_plot,
    thin,
    ticks,
)
from tests.examples import examples

Y = st.one_of(st.floats(-1e18, 1e18), st.just(math.nan), st.just(math.inf))
POINTS = st.lists(Y, max_size=30).map(lambda ys: tuple((float(i), y) for i, y in enumerate(ys)))


def pairs(svg: str) -> list[tuple[float, float]]:
    """All points of all lines and areas; also checks that the picture is well-formed."""
    ElementTree.fromstring(svg)
    raw = " ".join(re.findall(r' points="([^"]*)"', svg)).split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in raw)]


@examples(100)
@given(POINTS)
def test_lines_stay_inside_the_picture(points: tuple[tuple[float, float], ...]) -> None:
    svg = line_plot("<t>", [Series(name="a & b", points=points)], x_label="x")
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs(svg))


@examples(50)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=30))
def test_stacked_shares_fill_the_whole_height(columns: list[tuple[float, float]]) -> None:
    layers = {"a": [a for a, _ in columns], "b": [b for _, b in columns]}
    found = pairs(stacked_plot("t", [float(i) for i in range(len(columns))], layers, x_label="x"))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in found)
    if found:
        heights = {y for _, y in found}
        assert min(heights) < 40
        assert max(heights) > HEIGHT - 40


def test_a_split_bar_is_cut_by_size() -> None:
    svg = split_bar("t", {"a": 3.0, "b": 1.0}, {"a": "75 %"})
    widths = [float(w) for w in re.findall(r'width="([0-9.]+)" height="26"', svg)]
    assert widths[0] == 3 * widths[1]
    assert "nothing recorded" in split_bar("t", {"a": 0.0}, {})


def test_thinning_keeps_the_mean_and_the_gaps() -> None:
    points = [(float(i), float(i % 10)) for i in range(4000)]
    kept = thin(points)
    assert len(kept) == MOST_POINTS
    assert all(y == 4.5 for _, y in kept)
    assert math.isnan(thin([(0.0, math.nan)] * 1000)[0][1])
    assert thin(points[:5]) == points[:5]


def test_the_smooth_curve_of_a_constant_is_the_constant() -> None:
    assert all(math.isclose(y, 3.0) for _, y in smooth([(float(i), 3.0) for i in range(500)]))
    assert smooth([(0.0, math.nan)]) == []


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_evenly_apart_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert len(found) <= 7
    slack = width * 1e-3 + abs(low) * 1e-12
    assert all(low - slack <= value <= low + width + slack for value in found)
