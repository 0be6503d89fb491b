"""What the loaders of `loader` have in common: one way to prepare the text, one sum over what was read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bench.line import serve
from bench.texts import Texts
from shardwise.data.source import Prepared
from shardwise.data.text import text

Batch = dict[str, Tensor]


def prepare(texts: Texts) -> Prepared:
    """The corpus as shardwise prepares it: tokenised into the cache, or opened from there."""
    tokenizer = "bytes" if texts.tokenizer == "bytes" else None
    description = text(texts.corpus, vocab=texts.vocab, context=texts.context, tokenizer=tokenizer, held_out=0)
    return description.prepare(texts.cache, seed=texts.seed)


def flat_tokens(texts: Texts) -> npt.NDArray[np.uint16]:
    """The prepared tokens as one memory-mapped array, for the peers: they read the very same file."""
    found = json.loads(texts.tokens.read_text())
    return np.memmap(Path(found["path"]), dtype=np.uint16, mode="r", shape=(found["tokens"],))


def windows(texts: Texts) -> npt.NDArray[np.uint16]:
    """[samples, context + 1], a view: sample i begins at i x context."""
    tokens = flat_tokens(texts)
    count = (len(tokens) - 1) // texts.context
    shape, strides = (count, texts.context + 1), (texts.context * tokens.itemsize, tokens.itemsize)
    return np.lib.stride_tricks.as_strided(tokens, shape, strides, writeable=False)


def total(batches: Iterable[Batch]) -> float:
    """A sum over all tokens and targets that does not depend on their order."""
    return float(sum(int(b["tokens"].sum()) + 3 * int(b["targets"].sum()) for b in batches))


def serve_batches(epoch: Callable[[], Iterator[Batch]]) -> None:
    """Serve batches epoch after epoch; the checksum is that of one whole epoch, read for it."""

    def endless() -> Iterator[Any]:
        while True:
            yield from epoch()

    batches = endless()

    def step() -> float:
        return float(next(batches)["targets"][0, 0])

    serve(step, rank=0, world=1, checksum=lambda: total(epoch()))
