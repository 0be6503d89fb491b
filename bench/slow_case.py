"""The work of `slow_link` as a value: a small GPT on the interpreter's own standard library, byte by byte. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.case import Case
from shardwise.data.cache import cache_root
from shardwise.data.corpus import python_stdlib
from shardwise.data.order import sample_indices
from shardwise.data.text import text

HELD_OUT = 128  # windows, spread evenly over the held-out files
ORDERED, HELD = "ordered.npy", "held_out.npy"
ENOUGH = 10  # times the steps of a case: there is also timing


@dataclass(frozen=True, kw_only=True)
class SlowCase(Case):
    """About a million parameters and 160 tokens a rank and step: a core computes for 23 to 28 ms, DDP then sends 4 MB.

    `settings` are the system's own: a plan, a hook, its rank. The learning rate warms up and falls along a cosine over
    `steps`. `folder` also holds `held_out.npy`, uint16 [HELD_OUT, context + 1].
    """

    precision: str = "float32"
    batch: int = 2
    layers: int = 4
    width: int = 144
    heads: int = 2
    vocab: int = 257
    context: int = 80
    lr: float = 1e-3
    steps: int = 1500
    warmup: int = 100
    final: float = 0.1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of one step of all ranks."""
        return self.global_batch * self.context

    def rate(self, step: int) -> float:
        """The learning rate of `step` (0-based)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


def write_text(case: SlowCase) -> None:
    """Tokenise into the cache, once, and write what the systems read: the samples in order, the held-out windows."""
    prepared = text(python_stdlib(), vocab=case.vocab, context=case.context, tokenizer="bytes").prepare(cache_root())
    cached = Path(prepared.facts["tokenizer"]).parent
    folder = Path(case.folder)
    (folder / "tokens.bin").symlink_to(cached / "train.bin")
    samples = _windows(cached / "train.bin", case.context)
    order = sample_indices(np.arange(ENOUGH * case.steps * case.global_batch), len(samples), case.seed)
    np.save(folder / ORDERED, samples[order])
    held = _windows(cached / "eval.bin", case.context)
    np.save(folder / HELD, held[np.linspace(0, len(held) - 1, HELD_OUT).astype(int)])


def _windows(path: Path, context: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
