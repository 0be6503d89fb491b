"""What the ranks of `slow_link` share, in torch: batches, learning rate, held-out loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.slow_case import HELD, ORDERED, SlowCase
from shardwise.models.losses import next_token_loss

EVAL_BATCH = 32


class Ordered:
    """This rank's batches, step after step; they begin again after the last."""

    def __init__(self, case: SlowCase, rank: int) -> None:
        self.rows = np.load(Path(case.folder) / ORDERED, mmap_mode="r")
        self.case = case
        self.rank = rank

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = (step * self.case.global_batch + self.rank * self.case.batch) % len(self.rows)
        return _batch(self.rows[first : first + self.case.batch])


class HeldOut:
    """The loss on all held-out windows."""

    def __init__(self, case: SlowCase) -> None:
        self.rows = np.load(Path(case.folder) / HELD)

    def loss(self, module: nn.Module) -> float:
        """The mean over all targets; each rank asks its own module, and nothing is sent."""
        total = weight = 0.0
        module.eval()
        with torch.no_grad():
            for first in range(0, len(self.rows), EVAL_BATCH):
                batch = _batch(self.rows[first : first + EVAL_BATCH])
                one, count = next_token_loss(module(batch["tokens"]), batch)
                total, weight = total + float(one), weight + float(count)
        module.train()
        return total / weight


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _batch(rows: np.ndarray) -> dict[str, Tensor]:
    tokens = torch.from_numpy(rows.astype(np.int64))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
