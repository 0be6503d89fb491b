"""`synthetic(...)`: data that is computed, not read; learnable, so that a falling loss means something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shardwise.data.order import hash_words
from shardwise.data.samples import Prepared
from shardwise.errors import DataError

Kind = Literal["classes", "regression", "text"]
_Words = npt.NDArray[np.uint64]


def synthetic(
    kind: Kind = "classes",
    *,
    samples: int = 10_000,
    eval_samples: int = 1_000,
    shape: Sequence[int] = (32,),
    classes: int = 10,
    vocab: int = 256,
    context: int = 128,
    noise: float = 1.0,
    seed: int = 0,
) -> Synthetic:
    """Samples that are functions of their index and `seed`.

    "classes": `{"inputs": float32 [B, *shape], "targets": int64 [B]}`, a random prototype for each class plus
    `noise` standard deviations. "regression": a fixed random linear function of normal inputs plus noise, targets
    float32 [B, 1]. "text": `{"tokens", "targets"}` int64 [B, context]; each token is a fixed function of the one
    before it, and with probability noise / 10 a random one. Raises DataError for sizes below 1.
    """
    sizes = {"samples": samples, "classes": classes, "vocab": vocab, "context": context, "shape": min(shape, default=0)}
    for name, value in sizes.items():
        if value < 1:
            raise DataError(f"{name} of the synthetic data is {value}; it must be at least 1.")
    if kind not in ("classes", "regression", "text"):
        raise DataError(f"kind='{kind}' of the synthetic data; it is 'classes', 'regression' or 'text'.")
    return Synthetic(kind, samples, eval_samples, tuple(shape), classes, vocab, context, noise, seed)


@dataclass(frozen=True)
class Synthetic:
    """Made by `synthetic`."""

    kind: Kind
    samples: int
    eval_samples: int
    shape: tuple[int, ...]
    classes: int
    vocab: int
    context: int
    noise: float
    seed: int

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Nothing is written. Facts: samples, eval_samples, and classes, or vocab, context and tokens."""
        facts: dict[str, Any] = {"samples": self.samples, "eval_samples": self.eval_samples}
        if self.kind == "text":
            facts |= {"vocab": self.vocab, "context": self.context, "tokens": self.samples * self.context}
        elif self.kind == "classes":
            facts |= {"classes": self.classes}
        held = SyntheticSamples(self, self.samples, self.eval_samples) if self.eval_samples else None
        return Prepared(train=SyntheticSamples(self, 0, self.samples), eval=held, facts=facts)


class SyntheticSamples:
    """Samples number `first` and after; computed for a whole batch at a time."""

    user_code = False

    def __init__(self, made_by: Synthetic, first: int, count: int) -> None:
        self._of, self._first, self._count = made_by, first, count
        self.weight_hint = made_by.context if made_by.kind == "text" else 1

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """As `synthetic` says."""
        import torch

        numbers = np.asarray(indices, dtype=np.uint64) + np.uint64(self._first)
        make = {"classes": self._classes, "regression": self._regression, "text": self._text}[self._of.kind]
        return {key: torch.from_numpy(value) for key, value in make(numbers).items()}

    def _classes(self, numbers: _Words) -> dict[str, npt.NDArray[Any]]:
        of = self._of
        targets = (_words(of.seed, numbers, 1)[:, 0] % np.uint64(of.classes)).astype(np.int64)
        prototypes = _normals(of.seed + 1, np.arange(of.classes, dtype=np.uint64), int(np.prod(of.shape)))
        inputs = prototypes[targets] + of.noise * _normals(of.seed + 2, numbers, prototypes.shape[1])
        return {"inputs": inputs.astype(np.float32).reshape(-1, *of.shape), "targets": targets}

    def _regression(self, numbers: _Words) -> dict[str, npt.NDArray[Any]]:
        of = self._of
        size = int(np.prod(of.shape))
        inputs = _normals(of.seed, numbers, size)
        weights = _normals(of.seed + 1, np.zeros(1, dtype=np.uint64), size)[0] / np.sqrt(size)
        targets = inputs @ weights + of.noise * _normals(of.seed + 2, numbers, 1)[:, 0]
        return {
            "inputs": inputs.astype(np.float32).reshape(-1, *of.shape),
            "targets": targets.astype(np.float32)[:, None],
        }

    def _text(self, numbers: _Words) -> dict[str, npt.NDArray[Any]]:
        of = self._of
        vocab = np.uint64(of.vocab)
        follows = _words(of.seed + 1, np.zeros(1, dtype=np.uint64), of.vocab)[0] % vocab
        random = _words(of.seed, numbers, of.context + 1) % vocab
        strays = _uniforms(of.seed + 2, numbers, of.context + 1) < of.noise / 10
        tokens = random.copy()
        for at in range(1, of.context + 1):
            tokens[:, at] = np.where(strays[:, at], random[:, at], follows[tokens[:, at - 1]])
        found = tokens.astype(np.int64)
        return {"tokens": found[:, :-1].copy(), "targets": found[:, 1:].copy()}


def _words(seed: int, numbers: _Words, width: int) -> _Words:
    """[len(numbers), width] pseudo-random words, each row a function of seed and number."""
    rows = hash_words(numbers ^ hash_words(np.full(1, seed % (1 << 64), dtype=np.uint64)))
    return hash_words(rows[:, None] ^ hash_words(np.arange(width, dtype=np.uint64)))


def _uniforms(seed: int, numbers: _Words, width: int) -> npt.NDArray[np.float64]:
    """In 0 (exclusive) to 1."""
    return ((_words(seed, numbers, width) >> np.uint64(11)) + np.uint64(1)) / float(1 << 53)


def _normals(seed: int, numbers: _Words, width: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers (Box and Muller 1958)."""
    uniform = _uniforms(seed, numbers, 2 * width)
    found: npt.NDArray[np.float64] = np.sqrt(-2 * np.log(uniform[:, :width])) * np.cos(2 * np.pi * uniform[:, width:])
    return found
