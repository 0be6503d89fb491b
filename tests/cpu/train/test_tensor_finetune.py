"""Fine-tuning with split layers: whole and LoRA, beside replicas and stages, and weights that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from test_finetune import TOKENS, _by_hand, _kept, losses, slow, written

from shardwise.train import api

__all__ = ["written"]  # a fixture


@pytest.mark.parametrize(
    ("recipe", "lora", "plan"),
    [
        ("smollm2", True, "tensor=2"),
        slow("smollm2", False, "tensor=2"),
        slow("minilm", False, "tensor=2"),
        slow("minilm", True, "tensor=2"),
        slow("smollm2", True, "data=2,tensor=2"),
        slow("minilm", True, "data=2,tensor=2"),
        slow("smollm2", False, "pipeline=2,tensor=2"),
        slow("smollm2", True, "pipeline=2,tensor=2"),
        slow("minilm", False, "pipeline=2,tensor=2"),
        slow("smollm2", True, "shard=2,zero=3,tensor=2"),
    ],
)
def test_recipes_compute_what_one_device_does(recipe: str, lora: bool, plan: str, written: Any) -> None:
    found = api.verify(str(written(recipe)), plan=plan, lora=lora)
    assert found.same, found.text()
    assert found.splits


@pytest.mark.slow
def test_weights_trained_in_parts_are_a_model_of_transformers(trained: Any, written: Any, tmp_path: Path) -> None:
    file = written("smollm2")
    one, run = trained(file, plan="data=1"), trained(file, plan="tensor=2")
    assert losses(run.path) == pytest.approx(losses(one.path), rel=1e-5)
    out = api.export(run.path, to="transformers", out=tmp_path / "out", runs=run.path.parent)
    loaded = tf.AutoModelForCausalLM.from_pretrained(out)
    expected = _by_hand(tf.LlamaForCausalLM(tf.LlamaConfig.from_pretrained(out)), _kept(run.path))
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
