"""`CompressedSum`: sums over ranks of which a part is left for the next step, in place of an all-reduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.exchange import Bucketed, Pending
from shardwise.comm.group import Group
from shardwise.comm.residuals import Residuals

STEPS, RESIDUAL, METHOD = "steps", "residual.", "method."


class Method(Protocol):
    """How one bucket is summed with loss."""

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        """The buckets are laid out like this from now on."""

    def begin(self, number: int, residual: Tensor | None, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        """Begin with bucket `number`: `body` [numel] becomes the sum or the mean of what arrives, `tail` is summed as
        it is. What this rank's `body` plus `residual` had and the sum does not have becomes the residual.

        Steps begin with bucket 0; what an interrupted one left behind is forgotten then.
        """

    def state(self) -> dict[str, Tensor]:
        """What the method keeps from step to step, the same on every rank."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""


class CompressedSum:
    """An `Exchange` that sums buckets by a lossy method, with error feedback: what a rank left out of one step's sum is
    added to its next gradient, so that in the long run the sum over steps is the sum of the gradients.

    The first `start` steps are exact, and every step while `exact` is true; what was left out so far goes into the
    first exact step. Without `feedback` it is lost. A step whose gradients are not finite leaves the residual of the
    buckets concerned as it was.
    """

    def __init__(self, group: Group, method: Method, *, feedback: bool = True, start: int = 0) -> None:
        self._group = group
        self._method = method
        self._start = start
        self._steps = 0
        self._residuals = Residuals() if feedback else None
        self.exact = False

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        """See `Exchange.arrange`."""
        self._method.arrange(buckets)
        if self._residuals is not None:
            self._residuals.arrange(buckets)

    def rescale(self, scale: float) -> None:
        """Gradients are multiplied with `scale` from now on: a loss scale, or one over the guessed global weight.

        Called before a step in which that differs from the last one; a residual counts in those units.
        """
        if self._residuals is not None:
            self._residuals.rescale(scale)

    def start(self, number: int, flat: Tensor, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        """See `Exchange.start`: called in the order of the buckets, from 0 on, on every rank."""
        self._steps += number == 0
        if self.exact or self._steps <= self._start or not body.numel():
            if self._residuals is not None:
                self._residuals.give_back(number, body)
            return self._group.all_reduce(flat, dist.ReduceOp.AVG if mean else dist.ReduceOp.SUM)
        residual = self._residuals.of(number) if self._residuals is not None else None
        return self._method.begin(number, residual, body, tail, mean=mean)

    def close(self) -> None:
        """See `Exchange.close`."""

    def state(self) -> dict[str, Tensor]:
        """`residual.NAME` is this rank's own, in the shape of the parameter; the rest is the same on every rank."""
        found = {STEPS: torch.tensor(self._steps)}
        found |= {METHOD + name: kept for name, kept in self._method.state().items()}
        if self._residuals is not None:
            found |= {RESIDUAL + name: kept for name, kept in self._residuals.state().items()}
        return found

    def load_state(self, ranks: Sequence[Mapping[str, Tensor]], rank: int) -> None:
        """Take over what the ranks of a checkpoint kept; with another number of them, what they left out is shared.

        Raises CheckpointError for a state of other parameters.
        """
        self._steps = int(ranks[0].get(STEPS, torch.tensor(0)))
        self._method.load_state(_under(METHOD, ranks[0]))
        if self._residuals is not None:
            self._residuals.load_state([_under(RESIDUAL, state) for state in ranks], rank, self._group.size())


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): kept for name, kept in state.items() if name.startswith(prefix)}
