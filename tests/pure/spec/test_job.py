"""The job's own rules: learning-rate schedules, batch scaling, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import SpecError
from shardwise.spec.job import Optimizer, TrainJob


def job(**more: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "model": lambda: None,
        "loss": lambda output, batch: (output, 1),
        "data": None,
        "optimizer": Optimizer(optimizer="SGD", lr=0.1),
        "global_batch": 8,
        "steps": 10,
    }
    return TrainJob(**{**fields, **more})


@given(st.integers(0, 50), st.integers(1, 200), st.sampled_from(["constant", "cosine", "linear"]), st.floats(0, 1))
def test_a_schedule_rises_to_one_and_never_leaves_its_bounds(
    warmup: int, steps: int, schedule: Any, final: float
) -> None:
    spec = Optimizer(optimizer="SGD", lr=1.0, warmup=warmup, schedule=schedule, final=final)
    factors = [spec.factor(step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert math.isclose(falling[0], 1.0)
        assert all(factor >= final - 1e-12 for factor in falling)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert math.isclose(Optimizer(optimizer="SGD", lr=1.0, schedule="cosine").factor(50, 100), 0.5)


def test_learning_rate_scales_with_the_global_batch() -> None:
    assert Optimizer(optimizer="SGD", lr=0.1, scaling="linear", base_batch=8).scaled_lr(32) == pytest.approx(0.4)
    assert Optimizer(optimizer="SGD", lr=0.1, scaling="sqrt", base_batch=8).scaled_lr(32) == pytest.approx(0.2)
    assert Optimizer(optimizer="SGD", lr=0.1).scaled_lr(32) == 0.1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"global_batch": 0}, "global_batch=0"),
        ({"steps": -1}, "steps=-1"),
        ({"loss": 3}, "loss of the job is 3"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"logical_shards": 0}, "logical_shards=0"),
    ],
)
def test_a_bad_job_names_the_field_and_the_value(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(**fields)
    assert says in str(caught.value)


def test_scaling_needs_a_base_batch() -> None:
    with pytest.raises(SpecError, match="base_batch"):
        Optimizer(optimizer="SGD", lr=0.1, scaling="linear")
