"""Whole runs in stages: the same losses as one process, and checkpoints that go on in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import NoPlanFits, SpecError
from shardwise.spec import files
from shardwise.spec.plan import Plan
from shardwise.train import api
from tests.cpu.train.test_train import goes_on, losses, named, weights

Train = Callable[..., Any]


def test_two_stages_train_like_one_process(trained: Train) -> None:
    one, two = trained(plan="data=1,microbatches=8", dropout=0.3), trained(plan="pipeline=2", dropout=0.3)
    assert losses(two.path) == pytest.approx(losses(one.path), rel=1e-5)
    for name, tensor in weights(one.path).items():
        torch.testing.assert_close(weights(two.path)[name], tensor, rtol=1e-4, atol=1e-6)
    plan = files.load(two.path / "plan.json", Plan)
    assert (plan.data, plan.pipeline, plan.microbatches, len(plan.stages)) == (1, 2, 8, 2)
    for a, b in zip(named(one.path, "evaluation"), named(two.path, "evaluation"), strict=True):
        assert (b["loss"], b["accuracy"]) == pytest.approx((a["loss"], a["accuracy"]), rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [("pipeline=2", "data=2"), ("data=2", "pipeline=2"), ("pipeline=2", "pipeline=2"), ("pipeline=2", "data=1")],
)
def test_a_killed_run_goes_on_in_another_layout(before: str, after: str, trained: Train, tmp_path: Path) -> None:
    went_on = goes_on(before, after, trained, tmp_path)
    plan = files.load(went_on.path / "plan.json", Plan)
    assert plan.microbatches == (8 if "pipeline" in after else 1)


def test_a_plan_says_where_it_cuts_and_what_is_idle(trained: Train, tmp_path: Path) -> None:
    report = api.plan(tmp_path / "small.py", plan="pipeline=2,data=1,microbatches=4")
    assert [stage.first for stage in report.plan.stages][0] == 0
    assert report.plan.blocks == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert report.plan.predicted is not None
    assert report.plan.predicted.parts_s["bubble"] > 0


@pytest.mark.parametrize(
    ("plan", "error", "said"),
    [
        ("pipeline=2,virtual=3,schedule=interleaved", NoPlanFits, "can be cut into 4 at most"),
        ("pipeline=2,schedule=gpip", SpecError, "did you mean 'gpipe'"),
        ("pipeline=2,virtual=2", SpecError, "virtual=2 or more stages a rank"),
        ("pipeline=2,schedule=zbv,virtual=3", SpecError, "Use virtual=2"),
        ("virtual=2", SpecError, "without a pipeline"),
        ("pipeline=2,exact=true", SpecError, "exact=true with a pipeline"),
        ("pipeline=2,sync=local,sync.every=3", SpecError, "pipeline=2 does not go with sync=local"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_before_it_starts(
    plan: str, error: type[Exception], said: str, trained: Train, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        api.plan(tmp_path / "small.py", plan=plan)
