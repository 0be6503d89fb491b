"""What tables of token counts reach on the held-out text: the figures that a trained model has to beat."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.int64]
_CHUNK = 1 << 18
_BLOCK = 1 << 16
_DENSE = 1 << 17
_HELD_OUT_LIMIT = 1 << 20
_STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def table_perplexities(train: Path, held_out: Path, dtype: npt.DTypeLike, vocab: int) -> dict[str, float]:
    """`{"unigram_perplexity", "bigram_perplexity"}` of the held-out tokens from counts over the training tokens.

    Unigram: p(w) = (c(w) + 1) / (N + V), add-one. Bigram: p(w | v) = (c(v, w) + m p(w)) / (c(v) + m), interpolation
    with the unigram by a Dirichlet prior (MacKay and Peto 1995), so that unseen pairs are finite; m is the best of
    1, 10 ... 10000 on the held-out text itself, which favours the table a little. Held-out text beyond 1 Mi tokens is
    represented by blocks spread evenly over it. Memory: the distinct pairs of that text, whatever the corpus.
    """
    blocks = list(_blocks(held_out, dtype))
    pairs, times = _distinct([_pairs(block, vocab) for block in blocks])
    ones = np.zeros(vocab, dtype=np.int64)
    twos = np.zeros(len(pairs), dtype=np.int64)
    previous: int | None = None
    for chunk in _chunks(train, dtype):
        ones += np.bincount(chunk, minlength=vocab)
        joined = chunk if previous is None else np.concatenate(([previous], chunk))
        previous = int(chunk[-1])
        _count_into(twos, pairs, _pairs(joined, vocab), vocab)
    first, second = pairs // vocab, pairs % vocab
    unigram = (ones + 1) / (ones.sum() + vocab)
    weight = times / times.sum()
    entropies = [
        -float(weight @ np.log((twos + strength * unigram[second]) / (ones[first] + strength)))
        for strength in _STRENGTHS
    ]
    return {
        "unigram_perplexity": math.exp(-float(weight @ np.log(unigram[second]))),
        "bigram_perplexity": math.exp(min(entropies)),
    }


def _pairs(tokens: _Array, vocab: int) -> _Array:
    return tokens[:-1] * vocab + tokens[1:]


def _distinct(parts: list[_Array]) -> tuple[_Array, _Array]:
    values, times = np.unique(np.concatenate(parts), return_counts=True)
    return values, times


def _count_into(counts: _Array, wanted: _Array, found: _Array, vocab: int) -> None:
    """Add to `counts` how often each of `wanted` (sorted) is in `found`."""
    if vocab * vocab <= _DENSE:
        counts += np.bincount(found, minlength=vocab * vocab)[wanted]
        return
    values, times = np.unique(found, return_counts=True)  # sorted: the search below stays in cache
    place = np.searchsorted(wanted, values)
    place[place == len(wanted)] = 0
    hit = wanted[place] == values
    counts[place[hit]] += times[hit]


def _chunks(path: Path, dtype: npt.DTypeLike) -> Iterator[_Array]:
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype=dtype, count=_CHUNK)):
            yield chunk.astype(np.int64)


def _blocks(path: Path, dtype: npt.DTypeLike) -> Iterator[_Array]:
    """The file, or `_HELD_OUT_LIMIT` tokens of it in evenly spaced blocks."""
    total = path.stat().st_size // np.dtype(dtype).itemsize
    count = _HELD_OUT_LIMIT // _BLOCK
    if total <= _HELD_OUT_LIMIT:
        yield np.fromfile(path, dtype=dtype).astype(np.int64)
        return
    with open(path, "rb") as file:
        for number in range(count):
            start = number * (total - _BLOCK) // (count - 1)
            file.seek(start * np.dtype(dtype).itemsize)
            yield np.fromfile(file, dtype=dtype, count=_BLOCK).astype(np.int64)
