"""Every recipe's job builds, and its model and loss fit a batch shaped as its data; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.models.inputs import call
from shardwise.train import capture

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
TOKENS = torch.arange(24).view(2, 12)
BATCHES: dict[str, Any] = {
    "python_stdlib": {"tokens": TOKENS, "targets": TOKENS},
    "fashion_mnist": {"inputs": torch.randn(2, 1, 28, 28), "targets": torch.tensor([0, 9])},
    "imdb": {"tokens": TOKENS, "mask": torch.ones(2, 12, dtype=torch.bool), "targets": torch.tensor([0, 1])},
}


def test_every_recipe_is_tried() -> None:
    fine = {"finetune_smollm2", "finetune_minilm"}  # begin with weights that are fetched: tests/cpu/train
    assert {path.stem for path in RECIPES.glob("*.py")} == set(BATCHES) | fine


@pytest.mark.parametrize("name", BATCHES)
def test_a_recipe_builds_and_learns_something_from_a_batch(name: str) -> None:
    source = capture.find_job(str(RECIPES / f"{name}.py"))
    assert source is not None
    function = capture.load_function(source)
    job = capture.build(function, capture.bind(function, {}), folder=source.folder)
    module = job.model()
    total, weight = job.loss(call(module, BATCHES[name], job.forward), BATCHES[name])
    assert float(weight) == BATCHES[name]["targets"].numel()
    total.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    small = capture.build(function, capture.bind(function, job.small), folder=source.folder).model()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in module.parameters())
