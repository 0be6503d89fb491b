"""Loss sums and weights of all ranks in one row of float32, so that they travel in a gradient bucket and stay exact.

A float64 is the sum of three float32 (24 bits each), and adding zeros changes none of them: every rank fills the
columns of its own slots, the all-reduce brings everybody everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.comm.tree import sum_by_shard

PIECES = 3
COLUMNS = 2 * PIECES  # of one slot: the loss sum and the weight


class Totals(NamedTuple):
    """The global loss sum and weight, and the slots (ranks, or shards in exact mode) whose loss is not finite."""

    loss_sum: float
    weight: float
    bad: list[int]


def pair(loss_sum: Tensor, weight: Tensor) -> Tensor:
    """float64 [2] on the device of the loss."""
    loss_sum = loss_sum.detach().double()
    return torch.stack([loss_sum, weight.detach().to(loss_sum)])


def encode(pairs: Tensor) -> Tensor:
    """float64 [n, 2] -> float32 [n, 6] whose pieces add up to it exactly."""
    first = pairs.float()
    rest = torch.where(torch.isfinite(first), pairs - first.double(), 0.0)
    second = rest.float()
    third = (rest - second.double()).float()
    return torch.stack([first, second, third], dim=-1).reshape(-1, COLUMNS)


def decode(row: Sequence[float]) -> list[tuple[float, float]]:
    """The `(loss sum, weight)` of every slot of a reduced row."""
    values = [math.fsum(row[i : i + PIECES]) if math.isfinite(row[i]) else row[i] for i in range(0, len(row), PIECES)]
    return list(zip(values[::2], values[1::2], strict=True))


def fill(row: Tensor, slots: Mapping[int, Tensor]) -> None:
    """Write float64 [2] `(loss sum, weight)` of this rank's slots into the row, zeros elsewhere."""
    row.zero_()
    if slots:
        table = row.view(-1, COLUMNS)
        table[list(slots)] = encode(torch.stack(list(slots.values()))).to(row)


def total(pairs: Sequence[tuple[float, float]], *, tree: bool) -> Totals:
    """Sum the slots: in the fixed tree over shards, or from the first rank to the last."""
    add = sum_by_shard if tree else sum
    losses, weights = [p[0] for p in pairs], [p[1] for p in pairs]
    bad = [slot for slot, pair in enumerate(pairs) if not (math.isfinite(pair[0]) and math.isfinite(pair[1]))]
    return Totals(float(add(losses)), float(add(weights)), bad)
