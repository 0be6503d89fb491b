"""Finds losses that couple samples (contrastive ones): on pieces of a batch they are not the loss of the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work
from torch.utils._pytree import tree_leaves

from shardwise import events
from shardwise.errors import JobError
from shardwise.parallel.blame import name_of
from shardwise.parallel.contract import pair

if TYPE_CHECKING:
    from shardwise.parallel.parallelize import Replica

Loss = Callable[[Any, Any], tuple[Any, Any]]
UNKNOWN, SEPARATE, COUPLED = 0, 1, 2
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUGH = 3e-2  # outputs in 16 bits


def check(replica: Replica, loss: Loss, output: Any, batch: Any, pieces: int) -> int:
    """SEPARATE when the loss of the local batch is the sum over its halves, COUPLED when not, else UNKNOWN.

    Nothing is evaluated where the batch is never cut: one rank, one microbatch, not exact.
    """
    if replica.axis.size == 1 and pieces == 1 and not replica.shards:
        return SEPARATE
    samples = batch_size(batch)
    if samples < 2:
        return UNKNOWN
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            return _compare(loss, output, batch, samples)
    except Exception:  # whatever the loss does with half a batch, the step's own call is the one that must work
        return UNKNOWN
    finally:
        torch.set_rng_state(state)


def _compare(loss: Loss, output: Any, batch: Any, samples: int) -> int:
    half = samples // 2
    whole, again = pair(loss, output, batch), pair(loss, output, batch)
    parts = [
        pair(loss, part(output, samples, rows), part(batch, samples, rows))
        for rows in (slice(0, half), slice(half, samples))
    ]
    floats = [leaf.dtype for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    tolerance = max([TOLERANCE.get(dtype, ROUGH) for dtype in floats], default=ROUGH)
    verdicts = []
    for index in (0, 1):
        one, two = float(parts[0][index]), float(parts[1][index])
        limit = tolerance * (abs(one) + abs(two) + 1e-6)
        if not math.isfinite(one + two) or abs(float(whole[index]) - float(again[index])) > limit:
            return UNKNOWN
        verdicts.append(abs(float(whole[index]) - (one + two)) <= limit)
    return SEPARATE if all(verdicts) else COUPLED


def batch_size(batch: Any) -> int:
    """Rows of the first tensor in the batch, 0 when there is none."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0), 0)


def part(value: Any, samples: int, rows: slice) -> Any:
    """`rows` of everything that has one row a sample: tensors, lists of plain values, and what holds them."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 0 and len(value) == samples else value
    if isinstance(value, Mapping):
        pieces = {key: part(entry, samples, rows) for key, entry in value.items()}
        return pieces if type(value) is dict else type(value)(**pieces)
    if isinstance(value, (list, tuple)):
        if len(value) == samples and not any(isinstance(entry, (Tensor, Mapping, list, tuple)) for entry in value):
            return value[rows]
        pieces_list = [part(entry, samples, rows) for entry in value]
        return type(value)(*pieces_list) if hasattr(value, "_fields") else type(value)(pieces_list)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: part(getattr(value, f.name), samples, rows) for f in dataclasses.fields(value)}
        )
    return value


class Agreement:
    """What the ranks tell each other once, in the first step: rank 0's guess of the weight, and the worst verdict."""

    def __init__(self, replica: Replica, loss: Loss, told: Tensor, work: Work | None) -> None:
        self._replica = replica
        self._loss = loss
        self._told = told
        self._work = work

    def settle(self) -> None:
        """Raises JobError on every rank when the loss couples samples and the job did not say what to do about it."""
        replica = self._replica
        if self._work is not None:
            self._work.wait()
        guess, verdict = self._told.tolist()
        replica.settle_guess(guess)
        name = name_of(self._loss)
        if replica.coupled == "refuse" and verdict == COUPLED:
            raise JobError(
                f"loss ({name}) of a whole batch is not the sum of that over its halves, so ranks and microbatches "
                "would change it. If it compares samples with each other (contrastive, in-batch negatives), set "
                "coupled='gather' in the job: then every rank computes it on the outputs of the whole global batch. If "
                "not, let it return (sum over the samples, their number) instead of a mean."
            )
        if replica.coupled == "refuse" and verdict == UNKNOWN and replica.axis.rank == 0:
            events.emit(
                "warning",
                message=f"could not check that loss ({name}) treats samples separately (one sample a rank, or an "
                "output that cannot be halved); if it compares samples with each other, set coupled='gather'.",
            )


def agree(replica: Replica, loss: Loss, *, verdict: int, guess: float) -> Agreement:
    """Start the one exchange of the first step; every rank calls it once, also one without samples."""
    replica.fresh = False
    told = torch.tensor(
        [guess if replica.axis.rank == 0 or replica.coupled == "gather" else 0.0, float(verdict)],
        dtype=torch.float64,
        device=replica.mesh.device,
    )
    group = replica.axis.group
    return Agreement(replica, loss, told, group.all_reduce(told, dist.ReduceOp.MAX) if group is not None else None)
