"""Whole runs with a shard axis: the losses of one process, and checkpoints that go on in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import NoPlanFits, SpecError
from shardwise.train import api
from tests.cpu.train.test_train import goes_on, losses, named, weights

Train = Callable[..., Any]


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_shards_train_like_one_process(zero: int, trained: Train) -> None:
    one, two = trained(plan="data=1"), trained(plan=f"shard=2,zero={zero}")
    assert losses(two.path) == pytest.approx(losses(one.path), rel=1e-5)
    for name, tensor in weights(one.path).items():
        torch.testing.assert_close(weights(two.path)[name], tensor, rtol=1e-4, atol=1e-6)
    for a, b in zip(named(one.path, "evaluation"), named(two.path, "evaluation"), strict=True):
        assert (b["loss"], b["accuracy"]) == pytest.approx((a["loss"], a["accuracy"]), rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("shard=2,zero=3", "data=1"),
        ("data=1", "shard=2,zero=3"),
        ("shard=2,zero=1", "shard=2,zero=3"),
        ("shard=2,zero=3", "pipeline=2"),
    ],
)
def test_a_killed_run_goes_on_in_another_layout(before: str, after: str, trained: Train, tmp_path: Path) -> None:
    goes_on(before, after, trained, tmp_path)


def test_a_plan_says_what_sharding_saves(trained: Train, tmp_path: Path) -> None:
    parts = {
        zero: api.plan(tmp_path / "small.py", plan=f"shard=2,zero={zero}").plan.predicted.parts_bytes  # type: ignore[union-attr]
        for zero in (1, 2, 3)
    }
    whole = api.plan(tmp_path / "small.py", plan="data=2").plan.predicted.parts_bytes  # type: ignore[union-attr]
    for part, first in (("optimizer", 1), ("gradients", 2), ("parameters", 3)):
        for zero in (1, 2, 3):
            assert parts[zero][part] == (-(-whole[part] // 2) if zero >= first else whole[part])


@pytest.mark.parametrize(
    ("plan", "batch", "error", "said"),
    [
        ("shard=2,exact=true", 16, SpecError, "exact=true with a shard axis"),
        ("shard=2,sync=local,sync.every=3", 16, SpecError, "shard=2 does not go with sync=local"),
        ("shard=2,zero=4", 16, SpecError, "must be 1, 2 or 3"),
        ("shard=2,zero=3,microbatches=8", 15, NoPlanFits, "not the same number of microbatches"),
    ],
)
def test_what_a_shard_axis_cannot_do_is_refused_before_it_starts(
    plan: str, batch: int, error: type[Exception], said: str, trained: Train, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        api.plan(tmp_path / "small.py", plan=plan, batch=batch)
