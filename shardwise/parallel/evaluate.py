"""Loss and metrics on held-out data, each sample counted once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from shardwise.comm.collectives import totals
from shardwise.errors import JobError
from shardwise.models.inputs import call
from shardwise.parallel.blame import shapes, user_code
from shardwise.parallel.contract import pair
from shardwise.parallel.gathered import gathered_outputs

if TYPE_CHECKING:
    from shardwise.parallel.parallelize import Replica

Weighed = Callable[[Any, Any], tuple[Any, Any]]


def evaluate(
    replica: Replica,
    batches: Iterable[Any],
    loss: Weighed,
    metrics: Mapping[str, Weighed] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> dict[str, float]:
    """`{"loss": ..., name: ...}`: weighted means over the batches of all ranks, summed in float64; collective.

    Ranks may have different numbers of batches, or none; with `coupled="gather"` the functions see the batches that all
    ranks have in a round together, as the loss does in training. Replicas with `batch_norm="local"` first take rank 0's
    buffers. The module is in evaluation mode meanwhile. Raises JobError where model, loss or a metric fails, or when
    nothing was counted.
    """
    functions = {"loss": loss, **(metrics or {})}
    replica.sync_buffers()
    module, was_training = replica.module, replica.module.training
    sums = [0.0] * (2 * len(functions))
    module.eval()
    try:
        with torch.no_grad(), replica.formats.step(several=True), replica.working():
            outputs = _outputs(replica, batches, forward)
            for output, batch in gathered_outputs(replica, outputs) if replica.coupled == "gather" else outputs:
                _add(sums, _measure(replica, output, batch, functions))
    finally:
        module.train(was_training)
    found = totals(sums, replica.axis.group, replica.mesh.device)
    if replica.pipelined is not None:
        found = replica.pipelined.share(found)
    return {name: _mean(name, found[2 * i], found[2 * i + 1]) for i, name in enumerate(functions)}


def _outputs(replica: Replica, batches: Iterable[Any], forward: Any) -> Iterator[tuple[Any, Any]]:
    if replica.units is None:
        yield from _each_output(replica, batches, forward)
        return
    again: list[bool] = []  # of each batch, whether it has been counted before
    rounds = _rounds(replica, batches, again)
    for output, batch in _each_output(replica, rounds, forward):
        if not again[-1]:
            yield output, batch


def _rounds(replica: Replica, batches: Iterable[Any], again: list[bool]) -> Iterator[Any]:
    """As many batches on all ranks that gather parameters together: who has no more goes through its last one again."""
    axis, each, last = replica.mesh.axis("shard"), iter(batches), None
    while True:
        batch = next(each, None)
        having, ready = totals([float(batch is not None), float(batch is not None or last is not None)], axis.group)
        if not having:
            return
        if ready < axis.size:
            raise JobError(
                f"zero=3 needs at least one batch of evaluation data on each of the {axis.size} ranks of the shard "
                "axis. Give more evaluation data, or use zero=2."
            )
        again.append(batch is None)
        last = last if batch is None else batch
        yield last


def _each_output(replica: Replica, batches: Iterable[Any], forward: Any) -> Iterator[tuple[Any, Any]]:
    if replica.pipelined is not None:
        yield from replica.pipelined.outputs(map(replica.formats.place, batches), forward)
        return
    for raw in batches:
        batch = replica.formats.place(raw)
        yield _output(replica, batch, forward), batch


def _output(replica: Replica, batch: Any, forward: Any) -> Any:
    def about() -> str:
        return f"The batch was {shapes(batch)}."

    with replica.formats.forward(), user_code("the model (in evaluation)", about=about):
        return call(replica.module, batch, forward)


def _measure(replica: Replica, output: Any, batch: Any, functions: Mapping[str, Weighed]) -> list[float]:
    found: list[float] = []
    with replica.formats.forward():
        for name, function in functions.items():
            total, weight = pair(function, output, batch, field=name if name == "loss" else f"metrics['{name}']")
            found += [float(total), float(weight)]
    return found


def _add(sums: list[float], values: list[float]) -> None:
    for index, value in enumerate(values):
        sums[index] += value


def _mean(name: str, total: float, weight: float) -> float:
    if weight == 0:
        raise JobError(
            f"'{name}' counted nothing in the evaluation: its weight over all ranks is 0. Give evaluation data, or let "
            "it return the number of counted elements as its weight."
        )
    return total / weight
