"""Generation with a cache equals reading everything again; sampling is seeded and obeys top-k and stop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.models.generate import Cache, columns, generate, stream, window_of
from shardwise.models.gpt import GPT


def tiny(**changes: object) -> GPT:
    torch.manual_seed(1)
    gpt = GPT(**(dict(layers=2, width=32, heads=4, vocab=40, context=16) | changes))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return gpt


class Uncached(nn.Module):
    """The same model behind another class, so that every token is read again."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"norm": "layer", "activation": "gelu"}])
def test_cached_greedy_equals_the_argmax_of_the_whole_forward(changes: dict[str, object]) -> None:
    gpt = tiny(**changes).double()
    tokens = torch.randint(40, (3, 4))
    expected = tokens
    for _ in range(12):
        expected = torch.cat([expected, gpt(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(gpt.generate(tokens, 12), expected)


def test_cached_logits_equal_the_whole_forward() -> None:
    gpt = tiny().double()
    tokens = torch.randint(40, (2, 16))
    cache = Cache(gpt, batch=2, window=16)
    with torch.no_grad():
        whole = gpt(tokens)
        for length in (5, 6, 7, 8):
            torch.testing.assert_close(cache(tokens[:, :length]), whole[:, length - 1], rtol=1e-9, atol=1e-9)


def test_a_full_window_drops_its_older_half_with_and_without_cache() -> None:
    gpt = tiny().double()
    tokens = torch.randint(40, (2, 3))
    cached = generate(gpt, tokens, 50)
    assert cached.shape == (2, 53)
    assert torch.equal(cached, generate(Uncached(gpt), tokens, 50, context=16))
    assert [window_of(torch.zeros(1, n), 16).shape[1] for n in (1, 16, 17, 24, 25)] == [1, 16, 9, 16, 9]


def test_a_prompt_longer_than_the_context_is_cut() -> None:
    gpt = tiny().double()
    tokens = torch.randint(40, (1, 30))
    assert torch.equal(generate(gpt, tokens, 6), generate(Uncached(gpt), tokens, 6, context=16))


def test_sampling_is_seeded_and_stays_among_the_top_k() -> None:
    gpt = tiny()
    tokens = torch.randint(40, (2, 4))

    def sample(seed: int, **options: object) -> Tensor:
        return generate(gpt, tokens, 10, temperature=1.5, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(5, top_k=1), generate(gpt, tokens, 10))
    drawn = sample(2, top_k=3)
    for end in range(4, 14):
        best = gpt(drawn[:, :end])[:, -1].topk(3).indices
        assert (best == drawn[:, end, None]).any(-1).all()


def test_samples_follow_the_softmax() -> None:
    class Fixed(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 2.0]).expand(*tokens.shape, 3)

    tokens = torch.zeros(4000, 1, dtype=torch.int64)
    drawn = generate(Fixed(), tokens, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, 1]
    expected = torch.tensor([0.0, 2.0, 4.0]).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=3) / 4000, expected, atol=0.02, rtol=0)


def test_sequences_end_at_stop_and_are_filled_with_it() -> None:
    gpt = tiny()
    tokens = torch.randint(40, (4, 4))
    free = generate(gpt, tokens, 12)
    stop = int(free[0, 6])
    ended = generate(gpt, tokens, 12, stop=stop)
    for row, whole in zip(ended, free, strict=True):
        new = whole[4:].tolist()
        kept = new[: new.index(stop) + 1] if stop in new else new
        assert row[4 : 4 + len(kept)].tolist() == kept
        assert (row[4 + len(kept) :] == stop).all()
    alone = generate(gpt, tokens[:1], 12, stop=stop)
    assert alone.shape[1] == free[0, 4:].tolist().index(stop) + 5


def test_the_stream_gives_what_generate_joins() -> None:
    gpt = tiny()
    tokens = torch.randint(40, (2, 4))
    pieces = list(columns(gpt, tokens, 7))
    assert torch.equal(torch.stack(pieces, 1), generate(gpt, tokens, 7)[:, 4:])
    assert not pieces[0].requires_grad
    assert list(stream(gpt, tokens[:1], 7)) == [int(piece[0]) for piece in pieces]
    begun = columns(gpt, tokens, 7)
    next(begun)
    assert not gpt.training
    begun.close()
    assert gpt.training


def test_the_training_mode_is_given_back() -> None:
    gpt = tiny(dropout=0.5)
    first = generate(gpt, torch.zeros(1, 3, dtype=torch.int64), 8)
    assert gpt.training
    assert torch.equal(first, generate(gpt, torch.zeros(1, 3, dtype=torch.int64), 8))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": 1.0, "top_k": 0}])
def test_options_that_make_no_sense_are_named(options: dict[str, float]) -> None:
    with pytest.raises(JobError, match="temperature="):
        generate(tiny(), torch.zeros(1, 1, dtype=torch.int64), 1, **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(JobError, match="at least 1"):
        generate(tiny(), torch.zeros(1, 0, dtype=torch.int64), 1)
