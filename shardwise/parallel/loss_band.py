"""The band in which the loss must stay while gradients or parameters are not exactly those of one process."""

from __future__ import annotations

import collections
import math

WINDOW = 50  # steps
DEVIATIONS = 4.0
RISE = 1.05  # of the best window's mean


class LossBand:
    """Fed with each step's loss; asked, with the loss of an exact step, whether training has left the band.

    It has where that loss is not finite, is more than DEVIATIONS standard deviations above the mean of the last
    WINDOW steps (agreed parameters that are worse than each replica's own), or where that mean is more than
    DEVIATIONS standard errors of the difference of two means above RISE times the best so far (the best of many
    noisy means is low).
    """

    def __init__(self) -> None:
        self._last: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._best = math.inf

    def add(self, loss: float) -> None:
        self._last.append(loss)
        if len(self._last) == WINDOW:
            self._best = min(self._best, self._mean())

    def left(self, exact_loss: float) -> str:
        """Why training has left the band; empty while it has not, or too little is known."""
        if not math.isfinite(exact_loss):
            return "the loss of an exact step is not finite"
        if len(self._last) < WINDOW:
            return ""
        mean = self._mean()
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in self._last) / WINDOW)
        if not exact_loss <= mean + DEVIATIONS * spread + 1e-9 * abs(mean):
            return (
                f"the loss of an exact step is {exact_loss:.4g}, above the {mean:.4g} +- {spread:.2g} of the {WINDOW} "
                "steps before it"
            )
        if mean > RISE * self._best + DEVIATIONS * spread * math.sqrt(2 / WINDOW):
            return f"the mean loss of {WINDOW} steps rose from {self._best:.4g} to {mean:.4g}"
        return ""

    def _mean(self) -> float:
        return math.fsum(self._last) / len(self._last)
