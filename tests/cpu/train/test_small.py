"""Texts are made shorter where all of a batch is texts."""

from __future__ import annotations

import torch

from shardwise.train.small import LENGTH, shorter


def test_texts_are_shortened_together_and_nothing_else_is() -> None:
    tokens = torch.arange(600).view(2, 300)
    found = shorter({"tokens": tokens, "targets": tokens + 1, "label": torch.tensor([1, 2])})
    assert torch.equal(found["tokens"], tokens[:, :LENGTH])
    assert torch.equal(found["targets"], tokens[:, :LENGTH] + 1)
    assert found["label"].tolist() == [1, 2]
    images = {"image": torch.zeros(2, 300, 4, 4), "tokens": tokens}
    tables = {"inputs": torch.zeros(2, 300), "targets": torch.zeros(2, dtype=torch.int64)}
    unlike = {"tokens": tokens, "summary": tokens[:, :200]}
    short = {"tokens": tokens[:, :100]}
    assert all(shorter(batch) is batch for batch in (images, tables, unlike, short))
