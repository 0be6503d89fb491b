"""How the replicas of the data axis agree: what a step leaves to the plan's word of synchronisation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwise.comm.exchange import Exchange
from shardwise.comm.mesh import Axis
from shardwise.parallel.alone import Alone
from shardwise.parallel.reducer import Named, Reducer
from shardwise.parallel.scatter import Scatter
from shardwise.parallel.statistics import Totals
from shardwise.parallel.updates import Updates
from shardwise.plan.buckets import usual_bucket_bytes
from shardwise.spec.sync import Sync

Optimizers = Sequence[torch.optim.Optimizer]


class StepTimes(NamedTuple):
    """Seconds of one step on this rank: at work, and waiting for others."""

    work_s: float
    wait_s: float


class Kept(NamedTuple):
    """What a word keeps from step to step: `rows` of this rank alone, `common` the same on all, and plain data."""

    rows: dict[str, Tensor]
    common: dict[str, Tensor]
    plain: dict[str, Any]


class KeptByAll(NamedTuple):
    """The same as a checkpoint has it: the rows of every rank that wrote it, [ranks, ...] each."""

    rows: Mapping[str, Tensor]
    common: Mapping[str, Tensor]
    plain: Mapping[str, Any]


class Synchroniser:
    """Gradients summed over the ranks in every step: the words `all_reduce` and, with an exchange, `compressed`.

    A step computes its gradients with `reducer` and calls `finish_step`. Other words override what they do otherwise.
    """

    def __init__(
        self,
        named: Callable[[], Named],
        axis: Axis,
        sync: Sync,
        *,
        shards: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._exchange = exchange
        self.updates = Updates()  # how the parameters of this rank follow their gradients
        self._reducer: Reducer | Alone = Alone(named)
        if axis.size > 1 or shards:
            size = sync.bucket_bytes or chosen_bucket_bytes(named(), axis)
            self._reducer = Reducer(named, axis, bucket_bytes=size, shards=shards, exchange=exchange)

    clips = True  # whether the norm of the whole gradient is known before the update
    schedules = False  # whether learning rates are set here, by the `schedule` given to `begin`

    def begin(self, step: int, schedule: Callable[[int], object], ahead: int) -> None:
        """Training begins with `step`; `schedule(step)` sets the optimizers' rates. Batches are made `ahead` steps
        early at most. Called once, if at all, before the first step."""

    def start_step(self, optimizers: Optimizers) -> bool:
        """Be ready for the gradients of a step; False when the others have ended it already: then it is left out."""
        return True

    def told(self) -> Totals | None:
        """The newest totals of all ranks, where the reducer's are this rank's own and others are known."""
        return None

    def hands(self, global_batch: int, least: int) -> Callable[[int], range] | None:
        """Which of a step's samples this rank computes, at least so many, where that is not the same in every step."""
        return None

    def after_backward(self) -> None:
        """The backward pass of a microbatch is over."""

    @property
    def reducer(self) -> Reducer | Scatter | Alone:
        """What the gradients of the coming step go through."""
        return self._reducer

    def finish_step(self, optimizers: Optimizers, *, skipped: bool) -> float:
        """Update the parameters (unless `skipped`) and agree; the seconds waited for other ranks. Every rank calls it
        for every step."""
        if not skipped:
            self.updates.step(optimizers)
        return 0.0

    def observe(self, times: StepTimes, loss: float) -> None:
        """A step has ended with this loss. Called on every rank in every step."""

    @property
    def own_totals(self) -> bool:
        """Whether the reducer's totals are those of this rank alone."""
        return False

    def make_exact(self, exact: bool) -> None:
        """Whether the coming step's gradients are the exact sum over ranks, whatever the word. Replicas that are apart
        meet first. Collective."""
        if self._exchange is not None:
            self._exchange.exact = exact

    @contextlib.contextmanager
    def consistent(self, optimizers: Optimizers = ()) -> Iterator[None]:
        """In this block the module (and `optimizers`) hold what all ranks agree on, to evaluate or save. Collective."""
        yield

    def settle(self, optimizers: Optimizers = ()) -> None:
        """Make what `consistent` shows the state, for good: the end of training. Collective."""

    def keep(self, optimizers: Optimizers) -> Kept:
        """What a checkpoint must have for the next step to be the same, beyond the module and the optimizers."""
        return Kept(self._exchange.state() if self._exchange is not None else {}, {}, {})

    def loaded(self) -> None:
        """The module has this rank's part of what a checkpoint had. Collective."""

    def take(self, kept: KeptByAll, rank: int, optimizers: Optimizers) -> None:
        """Go on from what `keep` returned on the ranks of a checkpoint, perhaps another number of them."""
        ranks = max((len(rows) for rows in kept.rows.values()), default=0)
        if self._exchange is not None and ranks:
            self._exchange.load_state([{n: rows[r] for n, rows in kept.rows.items()} for r in range(ranks)], rank)

    def close(self) -> None:
        """Take the hooks off the module."""
        self.reducer.clear()
        self.reducer.close()
        if self._exchange is not None:
            self._exchange.close()


def chosen_bucket_bytes(named: Named, axis: Axis) -> int:
    """The size of buckets that the axis's transport usually asks for: alike on all ranks, and in every run."""
    size = sum(parameter.numel() * parameter.element_size() for _, parameter in named if parameter.requires_grad)
    return usual_bucket_bytes(size, axis.size, axis.group.transport if axis.group is not None else "")
