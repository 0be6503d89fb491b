"""Losses and metrics against torch's own, on every shape and batch form that they accept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import JobError
from shardwise.models import losses
from tests.examples import examples


def with_holes(shape: tuple[int, ...], classes: int, holes: float) -> torch.Tensor:
    targets = torch.randint(classes, shape)
    return targets.masked_fill(torch.rand(shape) < holes, losses.IGNORE)


@examples(30)
@given(
    rows=st.integers(0, 150),
    classes=st.integers(1, 9),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 0.125]),
)
def test_cross_entropy_and_its_gradient_equal_torchs(
    rows: int, classes: int, holes: float, dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(rows * 10 + classes)
    ours = (torch.randn(rows, classes) * 3).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    targets = with_holes((rows,), classes, holes)
    total, weight = losses.cross_entropy(ours, {"targets": targets})
    full = theirs if dtype == torch.float64 else theirs.float()
    expected = F.cross_entropy(full, targets, ignore_index=losses.IGNORE, reduction="sum")
    assert weight == (targets != losses.IGNORE).sum()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    (total * scale).backward()
    (expected * scale).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_cross_entropy_checks_out_numerically() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, -100, 1, 2])
    assert torch.autograd.gradcheck(lambda x: losses.cross_entropy(x, {"targets": targets})[0], (logits,))


def test_no_gradient_is_made_when_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *_: pytest.fail("a gradient was allocated"))
        total, _ = losses.cross_entropy(logits, {"targets": torch.arange(6) % 4})
    assert not total.requires_grad


def test_next_token_loss_shifts_labels_but_not_targets() -> None:
    logits, tokens = torch.randn(2, 7, 11), torch.randint(11, (2, 8))
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    total, weight = losses.next_token_loss(logits, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    torch.testing.assert_close(total, expected)
    assert weight == 14
    labels = tokens[:, :-1].clone()
    labels[0, 3] = -100
    total, weight = losses.next_token_loss(SimpleNamespace(logits=logits), {"input_ids": labels, "labels": labels})
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert weight == 11


def test_hugging_face_models_give_their_own_loss() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e .[hf]")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(30, (2, 9))
    total, weight = losses.next_token_loss(model(input_ids=tokens), {"labels": tokens})
    torch.testing.assert_close(total / weight, model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5), (2, 5, 4, 3)])
def test_cross_entropy_of_every_rank_equals_torchs(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    torch_form = logits.movedim(-1, 1) if len(shape) == 3 else logits
    targets = with_holes(torch_form[:, 0].shape, 5, 0.2)
    total, weight = losses.cross_entropy(logits, (None, targets))
    torch.testing.assert_close(total, F.cross_entropy(torch_form, targets, reduction="sum"))
    hits, counted = losses.accuracy(logits, (None, targets))
    assert counted == weight == (targets >= 0).sum()
    assert hits == (torch_form.argmax(1) == targets).sum()


def test_mse_weighs_elements_and_does_not_broadcast() -> None:
    output, targets = torch.randn(6, 1), torch.randn(6)
    total, weight = losses.mse(output, {"targets": targets})
    torch.testing.assert_close(total / weight, F.mse_loss(output[:, 0], targets))
    with pytest.raises(JobError, match=r"returned \[6, 2\].*targets are \[6\]"):
        losses.mse(torch.randn(6, 2), {"targets": targets})


def test_sums_and_weights_of_uneven_parts_give_the_mean_of_the_whole() -> None:
    logits, targets = torch.randn(10, 4), with_holes((10,), 4, 0.4)
    parts = [losses.cross_entropy(logits[rows], {"targets": targets[rows]}) for rows in (slice(0, 3), slice(3, 10))]
    mean = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets))


def test_compiled_and_eager_losses_agree() -> None:
    logits, batch = torch.randn(70, 9), {"targets": with_holes((70,), 9, 0.2)}
    compiled = torch.compile(losses.cross_entropy, backend="eager")
    torch.testing.assert_close(compiled(logits, batch), losses.cross_entropy(logits, batch))


@pytest.mark.parametrize(
    ("output", "batch", "words"),
    [
        (torch.randn(2, 3), {"inputs": 1}, "keys inputs"),
        (torch.randn(2, 3), torch.zeros(2), "a Tensor"),
        ("text", {"targets": torch.zeros(2)}, "returned str"),
        (torch.randn(2, 3), {"targets": torch.zeros(3, dtype=torch.int64)}, r"returned \[2, 3\].*targets are \[3\]"),
        (torch.randn(2, 3), {"targets": torch.zeros(2)}, "float32"),
        (torch.randn(2, 3), {"targets": torch.tensor([0, 3])}, "a target is 3 but the model has 3 classes"),
        (torch.randn(2, 3), {"targets": torch.tensor([0, -1])}, "a target is -1"),
    ],
)
def test_what_does_not_fit_is_explained(output: object, batch: object, words: str) -> None:
    with pytest.raises(JobError, match=words):
        losses.cross_entropy(output, batch)
