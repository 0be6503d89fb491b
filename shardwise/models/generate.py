"""Continue token sequences: greedy or sampled, with a key-value cache where the model is our GPT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.models.gpt import GPT
from shardwise.models.losses import logits_of


def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    context: int | None = None,
) -> Tensor:
    """`tokens` [B, T] int64 -> [B, T + n], n <= max_new.

    `temperature=0` takes the likeliest token; above 0 it samples, among the `top_k` likeliest if given, from
    `generator`. A sequence that has reached `stop` is filled up with it, and n is smaller when all have. `context` is
    how many of the last tokens the model sees: a GPT's own by default; when that window is full, its older half is
    dropped. Any module that maps tokens to logits [B, T, V] will do; only a GPT keeps a cache. Raises JobError.
    """
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    made = [tokens]
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "generator": generator, "context": context}
    for new in columns(model, tokens, max_new, **options):
        if stop is not None:
            new = torch.where(done, stop, new)
            done |= new == stop
        made.append(new[:, None])
        if stop is not None and bool(done.all()):
            break
    return torch.cat(made, dim=1)


def stream(model: nn.Module, tokens: Tensor, max_new: int, **options: Any) -> Iterator[int]:
    """The tokens that follow `tokens` [1, T], each as soon as it is known; options as for `columns`."""
    for new in columns(model, tokens, max_new, **options):
        yield int(new[0])


@torch.no_grad()
def columns(
    model: nn.Module,
    tokens: Tensor,
    max_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    context: int | None = None,
) -> Iterator[Tensor]:
    """The next token [B] of every sequence, as soon as it is known, `max_new` times; arguments as for `generate`.

    The model is in evaluation mode until the iterator ends or is closed.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise JobError(f"generate needs tokens of shape [batch, at least 1], got {list(tokens.shape)}.")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise JobError(f"temperature={temperature} must not be negative and top_k={top_k} must be at least 1 or None.")
    read = _reader(model, tokens, max_new, context)
    training = model.training
    model.eval()
    try:
        for _ in range(max_new):
            new = choose(read(tokens), temperature=temperature, top_k=top_k, generator=generator)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            yield new
    finally:
        model.train(training)


def choose(
    logits: Tensor, *, temperature: float = 0.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """One token for each row of `logits` [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, places = logits.topk(top_k, dim=-1)
        picked = torch.multinomial(values.softmax(-1), 1, generator=generator)
        return places.gather(-1, picked)[:, 0]
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _reader(model: nn.Module, tokens: Tensor, max_new: int, context: int | None) -> Callable[[Tensor], Tensor]:
    """A function from all tokens so far to the logits [B, V] of the next one."""
    if isinstance(model, GPT):
        window = min(context or model.context, model.context)
        return Cache(model, batch=len(tokens), window=min(window, tokens.shape[1] + max_new))
    return lambda seen: logits_of(model(window_of(seen, context) if context else seen))[:, -1]


def window_of(tokens: Tensor, context: int) -> Tensor:
    """What a model with `context` positions sees of `tokens` [B, T]: all, or the last of them once they are too many.

    The window starts at a multiple of half its size, so that it moves rarely and a cache serves in between.
    """
    half = max(1, context // 2)
    steps_over = max(0, -(-(tokens.shape[1] - context) // half))
    return tokens[:, steps_over * half :]


class Cache:
    """The keys and values of every layer of a GPT for the tokens read so far; `window` positions at most."""

    def __init__(self, model: GPT, *, batch: int, window: int) -> None:
        self.model, self.window = model, window
        self.start = self.length = 0  # the first token of the window, and how many after it are stored
        self.store: list[tuple[Tensor, Tensor]] = []
        self.batch = batch

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after `tokens` [B, T]: reads only those that are not stored yet."""
        seen = window_of(tokens, self.window)
        start = tokens.shape[1] - seen.shape[1]
        if start != self.start:
            self.start, self.length = start, 0
        unread = seen[:, self.length :]
        logits = self.read(unread)
        self.length += unread.shape[1]
        return logits

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after `tokens` [B, t], which stand at positions length .. length + t; t is 1 unless empty."""
        model, stop = self.model, self.length + tokens.shape[1]
        x = model.embed(tokens)
        rope = model.rope[:, self.length : stop]
        block: Any
        for index, block in enumerate(model.blocks):
            q, k, v = block.attention.project(block.attention_norm(x), rope)
            keys, values = self.layer(index, k)
            keys[:, :, self.length : stop] = k
            values[:, :, self.length : stop] = v
            x = x + block.attention.attend(q, keys[:, :, :stop], values[:, :, :stop])
            x = x + block.mlp(block.mlp_norm(x))
        logits: Tensor = model.head(model.norm(x[:, -1]))
        return logits

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if index == len(self.store):
            shape = (self.batch, like.shape[1], self.window, like.shape[3])
            self.store.append((like.new_empty(shape), like.new_empty(shape)))
        return self.store[index]
