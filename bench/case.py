"""One case of `data_parallel` as a value: it crosses into every system through the environment. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

CASE = "SHARDWISE_BENCH_CASE"


@dataclass(frozen=True, kw_only=True)
class Case:
    """The work of one step: a GPT of `layers` x `width`, `batch` samples a rank, on `ranks` ranks.

    `folder` holds the data: `tokens.bin`, uint16, of which sample i is the context + 1 tokens from i x context on, and
    `ordered.npy`, uint16 [samples, context + 1], the same samples in the order of the steps.
    """

    precision: str
    batch: int
    ranks: int = 2
    device: str = "cpu"
    layers: int = 10
    width: int = 256
    heads: int = 8
    vocab: int = 4096
    context: int = 256
    lr: float = 1e-4
    seed: int = 1
    exact: bool = False
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.precision} batch={self.batch}" + (
            f" on {self.ranks} {self.device}" if self.device != "cpu" else ""
        )

    @property
    def global_batch(self) -> int:
        return self.batch * self.ranks

    def environment(self) -> dict[str, str]:
        return {CASE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Case:
        """The case that the harness put into the environment."""
        return cls(**json.loads(os.environ[CASE]))

    def write_tokens(self, steps: int) -> None:
        """Write both files with the samples of `steps` steps: the same tokens for the same case."""
        samples = steps * self.global_batch
        tokens = pseudo_text(samples * self.context + 1, self.vocab, self.seed)
        tokens.tofile(Path(self.folder) / "tokens.bin")
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.context + 1)[:: self.context]
        np.save(Path(self.folder) / "ordered.npy", windows[order(samples, self.seed)])


def pseudo_text(length: int, vocab: int, seed: int) -> npt.NDArray[np.uint16]:
    """`length` tokens by Zipf's law, of which half follow from the one before: there is something to learn in it."""
    draw = np.random.default_rng(seed)
    fresh = (draw.zipf(1.3, length) - 1) % vocab
    follows = draw.random(length) < 0.5
    tokens = fresh.copy()
    tokens[1:] = np.where(follows[1:], (fresh[:-1] * 7 + 3) % vocab, fresh[1:])
    return tokens.astype(np.uint16)


def order(samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Which sample is at which position, as shardwise orders them: peers read a file that is laid out so."""
    from shardwise.data.order import sample_indices

    return sample_indices(np.arange(samples), samples, seed)
