"""What happens between the summed gradients and the optimizer: one multiplication, and the refusal of NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.errors import NonFiniteLoss
from shardwise.parallel.statistics import Totals


class Verdict(NamedTuple):
    """The gradient's 2-norm after normalisation, the factor still to apply, and why the step is bad (or empty)."""

    norm: float
    factor: float
    fault: str


def judge(
    totals: Totals, raw_norm: float, *, guess: float, loss_scale: float, clip_norm: float | None, unit: str
) -> Verdict:
    """`raw_norm` is that of gradients of `loss_scale / guess` times the loss sum; `factor` makes them the clipped ones.

    Clipping follows Pascanu et al. 2013 as torch's `clip_grad_norm_` does it. `unit` is what a slot is: rank or shard.
    """
    if totals.bad:
        value = "nan" if math.isnan(totals.loss_sum) else "infinite"
        return Verdict(math.nan, 1.0, f"the loss is {value} on {_slots(unit, totals.bad)}.")
    if not math.isfinite(raw_norm):
        return Verdict(raw_norm, 1.0, "the loss is finite but a gradient is nan or infinite.")
    if totals.weight == 0:
        return Verdict(0.0, 1.0, "")
    factor = guess / (loss_scale * totals.weight)  # 1.0 exactly where the weight is what was guessed
    norm = raw_norm * factor
    if clip_norm is not None:
        factor *= min(1.0, clip_norm / (norm + 1e-6))
    return Verdict(norm, factor, "")


def non_finite(fault: str) -> NonFiniteLoss:
    """The error of a step whose loss or gradient is not finite; no parameter was changed."""
    return NonFiniteLoss(f"{fault} No parameter was changed.")


def _slots(unit: str, bad: list[int]) -> str:
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return f"{unit} {shown}"


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The 2-norm over all elements: each tensor's in float32 (float64 where it is), together in float64."""
    if not tensors:
        return 0.0
    wide = [t for t in tensors if t.dtype == torch.float64]
    rest = [t for t in tensors if t.dtype != torch.float64]
    parts: list[float] = []
    for chosen, kind in ((wide, torch.float64), (rest, torch.float32)):
        if chosen:
            parts += torch.stack(list(torch._foreach_norm(chosen, dtype=kind))).tolist()
    return math.sqrt(sum(part * part for part in parts))
