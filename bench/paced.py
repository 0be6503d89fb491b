"""Workers whose steps take as long as they are told to, one of them slower than the others. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from bench.case import Case, pseudo_text
from bench.line import Message

PACE = "SHARDWISE_BENCH_PACE"
HELD_OUT, WINDOWS = "held_out.npy", 96


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Every worker sleeps `sample_s` for each sample of a step, the last one `times` as long.

    The held-out loss is looked at after `steps` steps; from step `settled` on the workers are at the pace that they
    keep.
    """

    sample_s: float
    times: float
    steps: int
    settled: int

    def seconds(self, samples: int, rank: int, ranks: int) -> float:
        """How long a rank sleeps in a step with so many samples."""
        return samples * self.sample_s * (self.times if rank == ranks - 1 else 1.0)

    def environment(self) -> dict[str, str]:
        return {PACE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Pace:
        """The pace that the harness put into the environment."""
        return cls(**json.loads(os.environ[PACE]))


@dataclass(frozen=True)
class Kept:
    """What one training run came to: samples a second of each worker from `settled` on, steps a second, loss."""

    rates: tuple[float, ...]
    steps_per_s: float
    loss: float

    @property
    def fast(self) -> float:
        """Samples a second of a fast worker: the mean over all but the last."""
        return sum(self.rates[:-1]) / (len(self.rates) - 1)


def kept(pace: Pace, answers: Sequence[Message], told: Sequence[Message]) -> Kept:
    """Of what every rank answered: seconds of each step, and then its samples of each step and the held-out loss."""
    timed = slice(pace.settled, pace.steps)
    seconds = [sum(answer["seconds"][timed]) for answer in answers]
    samples = [sum(each["samples"][timed]) for each in told]
    rates = tuple(count / spent for count, spent in zip(samples, seconds, strict=True))
    return Kept(rates, (pace.steps - pace.settled) / max(seconds), told[0]["loss"])


def write_held_out(case: Case) -> None:
    """Windows by the same law as the training tokens, of another draw."""
    tokens = pseudo_text(WINDOWS * (case.context + 1), case.vocab, case.seed + 1_000_000)
    np.save(f"{case.folder}/{HELD_OUT}", tokens.reshape(WINDOWS, case.context + 1))
