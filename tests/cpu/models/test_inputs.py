"""The calling rule: which parts of a batch reach a module's forward."""

from __future__ import annotations

import functools
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.models.inputs import call, parameters


class Echo(nn.Module):
    """Returns what it was called with."""

    def forward(self, tokens: Any, mask: Any = None, labels: Any = None) -> dict[str, Any]:
        return {"tokens": tokens, "mask": mask, "labels": labels}


class NeedsLabels(nn.Module):
    def forward(self, tokens: Any, labels: Any) -> Any:
        return tokens, labels


class AnyName(nn.Module):
    def forward(self, **entries: Any) -> dict[str, Any]:
        return entries


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_passed_by_name_and_labels_are_left_to_the_loss(kind: Any) -> None:
    batch = kind({"mask": 2, "tokens": 1, "labels": 3, "other": 4})
    assert call(Echo(), batch) == {"tokens": 1, "mask": 2, "labels": None}


def test_labels_are_passed_when_forward_cannot_do_without() -> None:
    assert call(NeedsLabels(), {"tokens": 1, "labels": 2}) == (1, 2)


def test_a_forward_of_any_names_gets_all_but_the_targets() -> None:
    assert call(AnyName(), {"a": 1, "b": 2, "targets": 3}) == {"a": 1, "b": 2}


def test_tuples_give_their_first_element_and_others_themselves() -> None:
    assert call(Echo(), (5, 6))["tokens"] == 5
    assert call(Echo(), [7])["tokens"] == 7
    x = torch.randn(2, 3)
    torch.testing.assert_close(call(nn.Identity(), x), x)


def test_one_entry_beside_the_targets_needs_no_name() -> None:
    layer = nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    torch.testing.assert_close(call(layer, {"inputs": x, "targets": torch.zeros(4)}), layer(x))


def test_the_users_forward_goes_first() -> None:
    assert call(Echo(), {"nothing": 1}, lambda module, batch: (type(module), batch["nothing"])) == (Echo, 1)


def test_wrapped_modules_are_looked_through() -> None:
    compiled = torch.compile(Echo(), backend="eager")
    assert parameters(compiled).names == ("tokens", "mask", "labels")
    assert call(compiled, {"tokens": 1, "mask": 2}) == {"tokens": 1, "mask": 2, "labels": None}


def test_a_forward_replaced_on_one_object_counts_for_that_object_only() -> None:
    changed, plain = Echo(), Echo()

    @functools.wraps(changed.forward)
    def doubled(tokens: Any) -> Any:
        return tokens * 2

    del doubled.__wrapped__
    changed.forward = doubled
    assert call(changed, {"tokens": 2, "mask": 1}) == 4
    assert call(plain, {"tokens": 2, "mask": 1})["mask"] == 1


@pytest.mark.parametrize("batch", [{"words": 1, "mask": 2}, {"labels": 3}, {}, ()])
def test_a_batch_that_does_not_fit_names_both_sides(batch: Any) -> None:
    words = "empty tuple" if batch == () else "Echo.forward takes tokens, mask, labels but the batch has"
    with pytest.raises(JobError, match=words):
        call(Echo(), batch)


def test_errors_inside_the_module_stay_as_they_are() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call(Broken(), {"x": 1})


def test_hugging_face_batches_fit_their_models() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e .[hf]")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(20, (2, 5))
    batch = transformers.BatchEncoding(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor([0, 1])}
    )
    output = call(model, batch)
    assert output.loss is None
    assert output.logits.shape == (2, 2)
