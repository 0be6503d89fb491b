"""The image classifier and the encoder: sizes, invariances, and that they learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.errors import JobError
from shardwise.models import resnet
from shardwise.models.encoder import Encoder


def encoder(**changes: object) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(**(dict(layers=2, width=32, heads=4, vocab=50, context=12, classes=3, dropout=0.0) | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


@pytest.mark.parametrize(("depth", "width", "count"), [(20, 16, 272_474), (8, 16, 78_042), (14, 8, 44_370)])
def test_resnet_has_the_papers_size(depth: int, width: int, count: int) -> None:
    # 0.27 M for ResNet-20 in table 6 of He et al., whose shortcuts have no weights: ours add 2,688 and their norms.
    model = resnet.ResNet(depth=depth, width=width, classes=10, channels=3)
    assert sum(p.numel() for p in model.parameters()) == count
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth
    assert len(model.blocks) == (depth - 2) // 2


def test_resnet_stages_halve_the_sides_and_double_the_channels() -> None:
    model = resnet.small(classes=7, channels=1)
    x = model.stem(torch.randn(2, 1, 28, 28))
    shapes = [tuple((x := block(x)).shape[1:]) for block in model.blocks]
    assert shapes == [(16, 28, 28), (32, 14, 14), (64, 7, 7)]
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 7)


def test_a_residual_block_starts_as_its_shortcut() -> None:
    block = resnet.ResNet(depth=14).blocks[1]
    x = torch.randn(2, 16, 8, 8).relu()
    torch.testing.assert_close(block(x), x)


def test_resnet_learns_a_batch() -> None:
    torch.manual_seed(0)
    model = resnet.ResNet(depth=8, width=8, classes=4, channels=1)
    images, targets = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("as_type", [torch.bool, torch.int64])
def test_padding_does_not_change_the_scores(pool: str, as_type: torch.dtype) -> None:
    model = encoder(pool=pool)
    tokens = torch.randint(50, (3, 12))
    lengths = torch.tensor([12, 7, 1])
    mask = (torch.arange(12) < lengths[:, None]).to(as_type)
    scores = model(tokens, mask)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(scores[row : row + 1], model(tokens[row : row + 1, :length]))
    other = torch.where(mask.bool(), tokens, torch.randint(50, (3, 12)))
    torch.testing.assert_close(model(other, mask), scores)


def test_pad_tokens_make_the_mask() -> None:
    model = encoder(pad=0)
    tokens = torch.randint(1, 50, (2, 12))
    tokens[1, 5:] = 0
    torch.testing.assert_close(model(tokens), model(tokens, tokens != 0))


def test_a_sample_of_padding_alone_leaves_all_gradients_finite() -> None:
    model = encoder()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    model(torch.randint(50, (2, 6)), mask).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_encoder_without_positions_is_blind_to_order() -> None:
    model = encoder()
    with torch.no_grad():
        model.position.weight.zero_()
    tokens = torch.randint(50, (2, 9))
    torch.testing.assert_close(model(tokens), model(tokens.flip(1)))


def test_encoder_learns_which_token_is_there() -> None:
    torch.manual_seed(0)
    model = Encoder(layers=1, width=16, heads=2, vocab=10, context=8, classes=2, dropout=0.0)
    tokens = torch.randint(1, 10, (32, 8))
    targets = (tokens == 3).any(1).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(80):
        loss = F.cross_entropy(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def shape_error(case: str) -> Tensor:
    if case == "depth":
        return resnet.ResNet(depth=9)(torch.zeros(1))
    if case == "channels":
        return resnet.small(channels=1)(torch.zeros(2, 3, 8, 8))
    if case == "pool":
        return encoder(pool="frist")(torch.zeros(1))
    if case == "heads":
        return encoder(heads=5)(torch.zeros(1))
    return encoder()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("depth", "depth=9"),
        ("channels", r"\[N, 1, height, width\] but was given \[2, 3, 8, 8\]"),
        ("pool", "did you mean 'first'"),
        ("heads", "width=32 .* heads=5"),
        ("length", "context=12 but was given 13"),
    ],
)
def test_what_does_not_fit_is_named(case: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        shape_error(case)
