"""Scores of a vocabulary that is cut: losses and their gradients are torch's own on the whole scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.models.losses import accuracy, next_token_loss
from shardwise.parallel.tensor.links import GroupLinks
from shardwise.parallel.tensor.scores import Scores
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

IDS = {2: (0, 0, 0, 1, 1, 1, 1), 3: (0, 0, 1, 1, 2, 2, 2)}
ROWS, WORDS = (2, 5), 7

Use = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Use] = {
    "mean": lambda s, t: F.cross_entropy(s.view(-1, WORDS), t.view(-1)),
    "sum": lambda s, t: F.cross_entropy(s.flatten(0, 1), t.flatten(), reduction="sum"),
    "rows": lambda s, t: F.cross_entropy(s.reshape(-1, s.size(-1)), t.view(-1), reduction="none").square().sum(),
    "ignored": lambda s, t: F.cross_entropy(s.view(-1, WORDS), t.view(-1).masked_fill(t.view(-1) > 3, -100)),
    "shifted": lambda s, t: F.cross_entropy(s[..., :-1, :].contiguous().view(-1, WORDS), t[..., 1:].reshape(-1)),
    "cast": lambda s, t: F.cross_entropy(s.float().view(-1, WORDS), t.view(-1)).double(),
    "in steps": lambda s, t: F.nll_loss(F.log_softmax(s.view(-1, WORDS), -1), t.view(-1)),
    "scaled": lambda s, t: F.cross_entropy((s / 0.7 * 2).view(-1, WORDS), t.view(-1)),
    "smoothed": lambda s, t: F.cross_entropy(s.view(-1, WORDS), t.view(-1), label_smoothing=0.1),
    "weighted": lambda s, t: F.cross_entropy(s.view(-1, WORDS), t.view(-1), weight=torch.arange(1.0, 8).double()),
    "softmax": lambda s, t: s.softmax(-1)[..., 2].log().sum(),
    "along rows": lambda s, t: (s.log_softmax(1) * s).sum(),
    "squares": lambda s, t: s.square().mean(),
    "one word": lambda s, t: s[0, :, 3].sum() + s[1, 2].max(),
    "ours": lambda s, t: next_token_loss(s, {"targets": t})[0],
    "large": lambda s, t: F.cross_entropy((s * 1e4).view(-1, WORDS), t.view(-1)),
}


def given() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randn(*ROWS, WORDS, generator=g, dtype=torch.float64), torch.randint(0, WORDS, ROWS, generator=g)


def on_a_rank(rank: Rank, name: str) -> Any:
    group = rank.mesh(Plan(tensor=rank.world)).axis("tensor").group
    assert group is not None
    links, ids = GroupLinks(group), IDS[rank.world]
    whole, targets = given()
    local = links.take(whole, 2, ids).clone().requires_grad_()
    scores = Scores.of(local, 2, ids, links)
    assert (scores.shape, scores.dtype, scores.requires_grad) == (whole.shape, whole.dtype, True)
    loss = LOSSES[name](scores, targets)
    loss.backward()
    assert local.grad is not None
    hits = float(accuracy(scores, {"targets": targets})[0])
    return loss.item(), links.join(local.grad, 2, ids), hits


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_cut_scores_is_that_of_whole_ones(name: str) -> None:
    whole, targets = given()
    whole.requires_grad_()
    loss = LOSSES[name](whole, targets)
    loss.backward()
    tolerance = 1e-6 if name == "cast" else 1e-12
    for ranks in (2, 3):
        for found, grad, hits in run_ranks(ranks, on_a_rank, name):
            assert found == pytest.approx(loss.item(), rel=tolerance)
            assert whole.grad is not None
            assert torch.allclose(grad, whole.grad, rtol=tolerance, atol=tolerance)
            assert hits == float((whole.argmax(-1) == targets).sum())


def test_losses_of_a_vocabulary_exchange_no_scores() -> None:
    def wire(rank: Rank) -> dict[str, tuple[int, int]]:
        mesh = rank.mesh(Plan(tensor=2))
        group = mesh.axis("tensor").group
        assert group is not None
        whole, targets = given()
        scores = Scores.of(GroupLinks(group).take(whole, 2, IDS[2]), 2, IDS[2], GroupLinks(group))
        LOSSES["mean"](scores, targets)
        return mesh.wire()

    rows = ROWS[0] * ROWS[1]
    assert run_ranks(2, wire)[0] == {"all_reduce": (3, 3 * rows * 8)}
