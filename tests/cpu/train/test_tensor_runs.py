"""Whole runs with split layers: the same losses as one process, and checkpoints that go on in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.train.test_train import goes_on

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
    goes_on(before, after, trained, tmp_path)
