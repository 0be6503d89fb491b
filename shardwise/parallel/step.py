"""One training step on one rank: microbatches, one synchronisation, normalisation by the global weight, optimizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from shardwise.errors import JobError, SpecError
from shardwise.models.inputs import call
from shardwise.parallel.blame import shapes, user_code
from shardwise.parallel.clip import Verdict, judge, non_finite
from shardwise.parallel.contract import pair
from shardwise.parallel.coupling import agree, check
from shardwise.parallel.evaluate import evaluate
from shardwise.parallel.gathered import gathered_step
from shardwise.parallel.parallelize import Replica
from shardwise.parallel.precision import LossScaler
from shardwise.parallel.statistics import Totals
from shardwise.parallel.synchronise import StepTimes

if TYPE_CHECKING:
    from shardwise.parallel.pipelined import Pipelined

__all__ = ["StepResult", "evaluate", "step"]

Loss = Callable[[Any, Any], tuple[Any, Any]]


class MicroBatch(Protocol):
    """A piece of this rank's share of a step: its batch, the seed of its random stream, its logical shard."""

    @property
    def batch(self) -> Any: ...
    @property
    def stream(self) -> int: ...
    @property
    def shard(self) -> int | None: ...


class StepResult(NamedTuple):
    """The mean loss over the global weight, the gradient's norm before clipping, and where the seconds went.

    `comm_s` is the exposed communication: the time spent waiting for other ranks, in whatever the step exchanges, not
    what overlapped with the backward pass. With a global weight of 0 nothing was counted: the loss is 0 and the step is
    `skipped`. By the clocks of a parameter server loss and weight are those of the newest step that all ranks have
    finished, and the norm is this rank's own. Between two synchronisations of local updates loss and norm are this
    rank's own, and the weight is as if the others had as much.
    """

    loss: float
    weight: float
    grad_norm: float | None
    skipped: bool
    compute_s: float
    comm_s: float
    optimizer_s: float


def step(
    replica: Replica,
    optimizers: Sequence[torch.optim.Optimizer],
    micro: Sequence[MicroBatch],
    *,
    loss: Loss,
    forward: Callable[[Any, Any], Any] | None = None,
    clip_norm: float | None = None,
    on_nan: Literal["stop", "skip"] = "stop",
    scaler: LossScaler | None = None,
) -> StepResult:
    """Compute this rank's microbatches (there may be none), agree on gradients with the other ranks, update.

    Gradients are those of the loss sum over all ranks divided by the global weight. Every rank calls this for every
    step and all return the same loss, weight and norm. Raises JobError for the user's mistakes, CommError when ranks
    are lost, and NonFiniteLoss (unless `on_nan` is "skip") on all ranks in the same step; parameters and optimizer
    state are then as before.
    """
    began = time.perf_counter()
    _refuse(replica, optimizers, clip_norm)
    if not replica.synchroniser.start_step(optimizers):
        return _left_out(replica, time.perf_counter() - began)
    started = time.perf_counter()
    scaler = scaler or replica.scaler
    if not replica.module.training:
        replica.module.train()
    buffers = replica.buffers() if on_nan == "skip" else []
    before = [buffer.clone() for buffer in buffers]  # a batch that is skipped must leave no trace in running statistics
    try:
        totals, waited = _gradients(replica, micro, loss, forward, scaler)
        verdict = _judged(replica, totals, clip_norm, scaler)
        computed = time.perf_counter()
        skipped = _skips(verdict, totals, on_nan, scaler)
        weight = replica.weigh(totals)
        if skipped:
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(kept)
        waited_after = _update(replica, optimizers, verdict.factor, skipped=skipped)
    finally:
        replica.reducer.clear()
    known = replica.synchroniser.told()
    if known is not None:
        totals, weight = known, known.weight
    mean = _mean(totals)
    ended = time.perf_counter()
    result = StepResult(
        mean,
        weight,
        verdict.norm,
        skipped,
        computed - started - waited,
        started - began + waited + waited_after,
        ended - computed - waited_after,
    )
    replica.synchroniser.observe(StepTimes(result.compute_s + result.optimizer_s, result.comm_s), mean)
    return result


def _judged(replica: Replica, totals: Totals, clip_norm: float | None, scaler: LossScaler | None) -> Verdict:
    return judge(
        totals,
        replica.norm(),
        guess=replica.divisor,
        loss_scale=scaler.scale if scaler else 1.0,
        clip_norm=clip_norm,
        unit="shard" if replica.shards else "rank",
    )


def _mean(totals: Totals) -> float:
    return totals.loss_sum / totals.weight if totals.weight else 0.0


def _refuse(replica: Replica, optimizers: Sequence[torch.optim.Optimizer], clip_norm: float | None) -> None:
    if replica.tensors is not None:
        replica.tensors.check(optimizers)
    if clip_norm is not None and not replica.synchroniser.clips:
        raise SpecError(
            f"clip_norm={clip_norm} does not go with the plan's {replica.plan.sync.word} (method "
            f"{replica.plan.sync.method}): no rank knows the norm of the whole gradient. Leave clip_norm out, or use "
            "sync=all_reduce."
        )


def _left_out(replica: Replica, waited_s: float) -> StepResult:
    """The result of a step that the other ranks had ended before this one began it."""
    totals = replica.synchroniser.told() or Totals(0.0, 0.0, [])
    return StepResult(_mean(totals), totals.weight, None, True, 0.0, waited_s, 0.0)


def _update(replica: Replica, optimizers: Sequence[torch.optim.Optimizer], factor: float, *, skipped: bool) -> float:
    """The parameters follow the gradients, times `factor`; the seconds that was waited for other ranks."""
    before = replica.mesh.waited_s()
    if not skipped and factor != 1.0:
        replica.reducer.scale(factor)
    with replica.mesh.timeline.span("optimizer"), user_code("the optimizer"):
        waited = replica.synchroniser.finish_step(optimizers, skipped=skipped)
    return max(waited, replica.mesh.waited_s() - before)  # an optimizer may exchange something too


def _skips(verdict: Verdict, totals: Totals, on_nan: str, scaler: LossScaler | None) -> bool:
    """Whether this step changes nothing; a float16 gradient that overflowed is retried at half the scale."""
    overflowed = bool(verdict.fault) and not totals.bad
    if scaler is not None and not totals.bad:
        could_halve = scaler.scale > 1
        scaler.update(finite=not verdict.fault)
        if overflowed and could_halve:
            return True
    if verdict.fault and on_nan == "stop":
        raise non_finite(verdict.fault)
    return bool(verdict.fault) or totals.weight == 0


def _gradients(
    replica: Replica, micro: Sequence[MicroBatch], loss: Loss, forward: Any, scaler: LossScaler | None
) -> tuple[Totals, float]:
    """Forward and backward of every microbatch, then the sums over all ranks, and the seconds waited for others."""
    earlier, span = replica.mesh.waited_s(), replica.mesh.timeline.span
    replica.begin(len(micro))
    with replica.formats.step(several=len(micro) > 1), replica.watching():
        if replica.pipelined is not None:
            _in_stages(replica, replica.pipelined, micro, loss, forward, scaler)
        elif replica.coupled == "gather":
            gathered_step(replica, micro, loss, forward, scaler)
        else:
            for index, one in enumerate(micro):
                replica.before_forward(index, one.shard)
                with span("forward", 0, index):
                    total = _loss_of(replica, one, loss, forward, first=index == 0, pieces=len(micro))
                replica.after_forward(one.shard)
                replica.reducer.begin_micro(shard=one.shard, last=index == len(micro) - 1)
                with span("backward", 0, index):
                    backward(total * replica.scale(scaler))
                replica.after_backward(index)
            replica.stand_in(len(micro), loss)
    before = replica.mesh.waited_s()  # what forward and backward exchange (batch norms, outputs) is waited for there
    totals, waited = replica.reducer.finish()
    if replica.pipelined is not None:
        totals = replica.pipelined.settle(totals)
    replica.end_step()
    return totals, before - earlier + max(waited, replica.mesh.waited_s() - before)


def _in_stages(
    replica: Replica,
    pipelined: Pipelined,
    micro: Sequence[MicroBatch],
    loss: Loss,
    forward: Any,
    scaler: LossScaler | None,
) -> None:
    """The same through a pipeline, whose schedule decides the order."""

    def head(output: Any, batch: Any, index: int) -> Tensor:
        total = _counted(replica, micro[index], output, batch, loss, first=index == 0, pieces=len(micro))
        _refuse_constant(total)
        return total * replica.scale(scaler)

    if not micro:  # what it answers to the others comes before what the reducer sends, as on those
        replica.stand_in(0, loss)
    replica.reducer.begin_micro(last=False)
    batches = [replica.formats.place(one.batch) for one in micro]
    with user_code("backward of the loss"):
        pipelined.train(batches, [one.stream for one in micro], head, loss, forward)
    if micro:
        replica.stand_in(len(micro), loss)


def _loss_of(replica: Replica, one: MicroBatch, loss: Loss, forward: Any, *, first: bool, pieces: int) -> Tensor:
    """Forward and loss of one microbatch, reported to the reducer; its loss sum, ready for backward."""
    replica.seed(one.stream)
    batch = replica.formats.place(one.batch)
    with replica.formats.forward():
        with user_code("the model", about=lambda: f"The batch was {shapes(batch)}."):
            output = call(replica.module, batch, forward)
        return _counted(replica, one, output, batch, loss, first=first, pieces=pieces)


def _counted(
    replica: Replica, one: MicroBatch, output: Any, batch: Any, loss: Loss, *, first: bool, pieces: int
) -> Tensor:
    """The loss sum of an output, reported to the reducer with its weight."""
    total, weight = pair(loss, output, batch)
    if first and replica.fresh:
        share = 1 if replica.shards else pieces
        agree(replica, loss, verdict=check(replica, loss, output, batch, pieces), guess=float(weight) * share).settle()
    replica.reducer.report(replica.slot(one.shard), total, weight)
    return total


def backward(total: Tensor) -> None:
    """Raises JobError where the loss does not depend on a parameter, or the user's own backward fails."""
    _refuse_constant(total)
    with user_code("backward of the loss"):
        total.backward()


def _refuse_constant(total: Tensor) -> None:
    if not total.requires_grad:
        raise JobError(
            "the loss does not depend on any parameter that requires a gradient, so there is nothing to train. Check "
            "that the model is not frozen, and that the loss uses its output without detach() or .item()."
        )
