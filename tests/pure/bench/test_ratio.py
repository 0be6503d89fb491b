from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.ratio import interval, paired


def test_ratios_are_taken_round_by_round() -> None:
    assert paired([2.0, 9.0, 4.0], [1.0, 3.0, 8.0]) == [2.0, 3.0, 0.5]


def test_a_lost_round_is_infinite_and_a_lost_base_says_nothing() -> None:
    assert paired([1.0, math.inf, 1.0], [2.0, 2.0, math.inf]) == [0.5, math.inf]


def test_equal_values_leave_no_doubt() -> None:
    assert interval([1.25] * 30) == (1.25, 1.25)


def test_the_interval_needs_a_value() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_the_interval_agrees_with_the_one_from_order_statistics() -> None:
    """For n = 30 the sign test's 95 % interval of the median is the 10th to the 21st value (David 1981)."""
    draw = random.Random(3)
    values = [draw.lognormvariate(0.0, 0.1) for _ in range(30)]
    ranked = sorted(values)
    low, high = interval(values)
    assert ranked[8] <= low <= ranked[11]
    assert ranked[18] <= high <= ranked[21]


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    draw = random.Random(7)
    trials = 200
    hits = 0
    for trial in range(trials):
        values = [draw.lognormvariate(0.02, 0.05) for _ in range(30)]
        low, high = interval(values, resamples=400, seed=trial)
        hits += low <= math.exp(0.02) <= high
    assert 0.90 <= hits / trials <= 0.99


def test_one_disturbed_round_hardly_moves_it() -> None:
    draw = random.Random(1)
    values = [draw.lognormvariate(0.0, 0.02) for _ in range(30)]
    calm, disturbed = interval(values), interval([*values[:-1], 50.0])
    assert disturbed == pytest.approx(calm, rel=0.02)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12))
def test_the_interval_holds_the_median_and_stays_within_the_values(values: list[float]) -> None:
    low, high = interval(values, resamples=200)
    assert min(values) <= low <= high <= max(values)
    assert low <= statistics.median(values) <= high


def test_the_same_values_give_the_same_interval() -> None:
    values = [random.Random(5).random() for _ in range(20)]
    assert interval(values) == interval(values)
