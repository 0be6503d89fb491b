"""Loss and metrics on held-out data, each sample counted once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from shardwise.comm.collectives import totals
from shardwise.errors import JobError
from shardwise.models.inputs import call
from shardwise.parallel.blame import shapes, user_code
from shardwise.parallel.contract import pair

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

    Ranks may have different numbers of batches, or none. Replicas with `batch_norm="local"` first take rank 0's
    buffers. The module is in evaluation mode meanwhile. Raises JobError where model, loss or a metric fails, or when
    nothing was counted.
    """
    functions = {"loss": loss, **(metrics or {})}
    replica.sync_buffers()
    module, was_training = replica.module, replica.module.training
    sums = [0.0] * (2 * len(functions))
    module.eval()
    try:
        with torch.no_grad(), replica.formats.step(several=True):
            for raw in batches:
                batch = replica.formats.place(raw)
                _add(sums, _measure(module, batch, functions, forward, replica))
    finally:
        module.train(was_training)
    found = totals(sums, replica.axis.group, replica.mesh.device)
    return {name: _mean(name, found[2 * i], found[2 * i + 1]) for i, name in enumerate(functions)}


def _measure(module: Any, batch: Any, functions: Mapping[str, Weighed], forward: Any, replica: Replica) -> list[float]:
    found: list[float] = []
    with replica.formats.forward():
        with user_code("the model (in evaluation)", about=lambda: f"The batch was {shapes(batch)}."):
            output = call(module, batch, forward)
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
