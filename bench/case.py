"""One case of `data_parallel` as a value: it crosses into every system through the environment. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

CASE = "SHARDWISE_BENCH_CASE"
SHARDS = 4  # logical shards of the exact mode: the job's default


@dataclass(frozen=True, kw_only=True)
class Case:
    """The work of one step: a GPT of `layers` x `width`, `batch` samples a rank, on `ranks` ranks.

    `folder` holds the token files: `tokens.npy` in the corpus's order and `ordered.npy` in the order of the steps,
    both uint16 [samples, context + 1].
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
    lr: float = 3e-4
    seed: int = 1
    exact: bool = False
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.precision} batch={self.batch}" + (f" on {self.ranks} {self.device}" if self.device != "cpu" else "")

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
        """Write the two token files with enough samples for `steps` steps: the same tokens for the same case."""
        samples = steps * self.global_batch
        tokens = pseudo_text(samples, self.context + 1, self.vocab, self.seed)
        np.save(Path(self.folder) / "tokens.npy", tokens)
        np.save(Path(self.folder) / "ordered.npy", tokens[order(samples, self.seed)])


def pseudo_text(samples: int, length: int, vocab: int, seed: int) -> np.ndarray:
    """[samples, length] uint16: words by Zipf's law, each drawn near its predecessor half of the time, so it can be learned."""
    draw = np.random.default_rng(seed)
    fresh = (draw.zipf(1.3, (samples, length)) - 1) % vocab
    near = draw.random((samples, length)) < 0.5
    tokens = fresh.copy()
    for column in range(1, length):
        follow = (tokens[:, column - 1] * 7 + 3 + fresh[:, column] % 4) % vocab
        tokens[:, column] = np.where(near[:, column], follow, fresh[:, column])
    return tokens.astype(np.uint16)


def order(samples: int, seed: int) -> np.ndarray:
    """Which sample is at which position, as shardwise orders them: peers read a file that is laid out so."""
    from shardwise.data.order import sample_index

    return np.array([int(sample_index(position, samples, seed)) for position in range(samples)])
