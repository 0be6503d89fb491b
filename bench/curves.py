"""Held-out loss over steps, and how many of them a system needs for a loss that another one reached. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Curve:
    """`held_out[i]` is the loss after `steps[i]` steps, the mean over the ranks' models; `seconds[i]` those steps took.

    `training` has the loss of every step, the mean over ranks.
    """

    steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)

    def add(self, losses: Sequence[float], seconds: float, held_out: float) -> None:
        """What a stretch of steps returned, how long it took, and the held-out loss after it."""
        self.training += losses
        self.steps.append(len(self.training))
        self.held_out.append(held_out)
        self.seconds.append(seconds + (self.seconds[-1] if self.seconds else 0.0))

    @property
    def last(self) -> float:
        """The loss at equal samples: after the last step."""
        return self.held_out[-1] if self.held_out else math.nan

    def steps_to(self, loss: float) -> float:
        """Steps until the held-out loss first falls to `loss`, on straight lines between evaluations; else infinite."""
        return _first(self.steps, self.held_out, loss)

    def seconds_to(self, loss: float) -> float:
        """Seconds until then, in this very run, without its evaluations."""
        return _first(self.seconds, self.held_out, loss)


def _first(moments: Sequence[float], losses: Sequence[float], loss: float) -> float:
    before, higher = 0.0, math.inf
    for moment, lower in zip(moments, losses, strict=True):
        if lower <= loss:
            share = (higher - loss) / (higher - lower) if math.isfinite(higher) else 1.0
            return before + share * (moment - before)
        before, higher = moment, lower
    return math.inf


def time_to(steps: float, step_s: float, *, start: int = 0, start_step_s: float = 0.0) -> float:
    """Seconds for `steps` steps, of which the first `start` take `start_step_s`."""
    if not math.isfinite(steps):
        return math.inf
    first = min(steps, start)
    return first * start_step_s + (steps - first) * step_s
