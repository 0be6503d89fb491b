"""Whole runs with split layers: the same losses as one process, and checkpoints that go on in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import ClusterError
from tests.cpu.train.test_train import losses, named, weights

Train = Callable[..., Any]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tensor=2", "data=1"),
        pytest.param("data=1", "tensor=2", marks=pytest.mark.slow),
        pytest.param("tensor=2", "tensor=2", marks=pytest.mark.slow),
        pytest.param("tensor=2", "pipeline=2", marks=pytest.mark.slow),
        pytest.param("shard=2", "tensor=2", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_in_another_layout(before: str, after: str, trained: Train, tmp_path: Path) -> None:
    flag = str(tmp_path / "killed")
    whole = trained(plan="data=1")
    with pytest.raises(ClusterError):
        trained(plan=before, die_at=7, flag=flag)
    went_on = trained(plan=after, resume="latest")
    assert named(went_on.path, "resumed")[0]["step"] == 4
    assert losses(went_on.path)[-8:] == pytest.approx(losses(whole.path)[4:], rel=1e-5)
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(weights(went_on.path)[name], tensor, rtol=1e-4, atol=1e-6)
