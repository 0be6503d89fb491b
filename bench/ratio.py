"""Paired ratios and their interval: what is left of a comparison after the machine's drift is divided out."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
RESAMPLES = 10_000
METHOD = f"{CONFIDENCE:.0%} percentile bootstrap of the median, {RESAMPLES} resamples"


def paired(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """`values[i] / base[i]` of each round; a round in which the base was lost says nothing and is left out.

    A lost round of `values` counts as infinite.
    """
    return [value / other for value, other in zip(values, base, strict=False) if math.isfinite(other) and other > 0]


def interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the median (Efron and Tibshirani 1993, chapter 13).

    The median makes it the same for ratios and for their logarithms, and one disturbed round moves it little.
    Raises ValueError without values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    outside = (1 - confidence) / 2
    return medians[int(outside * resamples)], medians[math.ceil((1 - outside) * resamples) - 1]
