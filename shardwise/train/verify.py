"""`verify`: a plan on small data computes what one device computes, and if not, what differs first.

All of it in float64: the ranks of the plan train some steps, then rank 0 alone trains the same ones, and losses,
gradients and parameters are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from shardwise.comm.mesh import Mesh, connect
from shardwise.comm.store import open_store
from shardwise.data.loader import LocalStep, open_batches
from shardwise.data.source import Prepared
from shardwise.models.dataflow import leaves_of
from shardwise.parallel.parallelize import Replica
from shardwise.parallel.step import step
from shardwise.spec import files
from shardwise.spec.job import TrainJob
from shardwise.spec.layout import Box, boxes, local_offsets
from shardwise.spec.plan import Offload, Plan, Recompute
from shardwise.train import capture, context
from shardwise.train.data import prepare
from shardwise.train.optimizers import Optimizers
from shardwise.train.probe import example_of
from shardwise.train.run import build_replica
from shardwise.train.small import depth, shallow, shorter
from shardwise.train.splits import agreed_splits
from shardwise.train.verified import TOLERANCE, Difference, Verified
from shardwise.train.worker import JOIN_LIMIT_S, closing

FLOOR = 1e-6  # of the largest norm: gradients smaller than that are zero but for rounding


def entry(*, rank: int, world: int, port: int, listen_fd: int | None, told: dict[str, Any]) -> None:
    """A rank of the plan; rank 0 writes a Verified into the folder."""
    context.mark_launched()
    plan = files.load(Path(told["folder"]) / "plan.json", Plan)
    store = open_store(listen_fd, port, rank, world, JOIN_LIMIT_S) if world > 1 else None
    job = _job(told)
    prepared = prepare(job)
    if not job.small:
        job = shallow(job, example_of(job, prepared))
    folder, steps = Path(told["folder"]), int(told["steps"])
    mesh = connect(plan, rank=rank, world=world, store=store)
    with closing(mesh):
        if plan.tensor > 1:
            splits = agreed_splits(job, plan, mesh, prepared)
            plan = mesh.plan = structs.replace(plan, splits=splits.splits)
            told = {**told, "splits": splits.hows, "whole": splits.whole}
        losses, tensors = _train(job, plan, mesh, prepared, steps)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{rank}.safetensors")
        if world > 1:
            torch.distributed.barrier()
        if rank == 0:
            found = [load_file(folder / f"{r}.safetensors") for r in range(world)]
            files.save(_compare(job, plan, prepared, losses, found, told), folder / "verified.json")
        if world > 1:
            torch.distributed.barrier()


def _job(told: Mapping[str, Any]) -> TrainJob:
    source = capture.JobSource(**told["source"])
    function = capture.load_function(source)
    job = capture.build(function, capture.bind(function, told["sets"]), folder=source.folder)
    return structs.replace(job, global_batch=int(told["global_batch"]))


def _compare(
    job: TrainJob, plan: Plan, prepared: Prepared, losses: list[float], found: list[dict[str, Tensor]], told: Any
) -> Verified:
    one = structs.replace(plan, data=1, shard=1, tensor=1, sequence=False, splits={})
    one = structs.replace(one, pipeline=1, virtual=1, schedule="1f1b", stages=(), blocks=())
    one = structs.replace(one, recompute=Recompute(), offload=Offload())
    alone = connect(one, rank=0, world=1, store=None)
    expected, reference = _train(job, one, alone, prepared, len(losses), places=plan.replicas)
    loss = _largest({f"step {i + 1}": (a, b) for i, (a, b) in enumerate(zip(losses, expected, strict=True))})
    outputs, gradients, parameters, buffers = (
        _differences({name: t for name, t in reference.items() if name.startswith(kind)}, found, plan)
        for kind in ("output/", "gradient/", "parameter/", "buffer/")
    )
    return Verified(
        asked=told["asked"],
        ran=str(plan),
        ranks=plan.ranks,
        steps=len(losses),
        losses=tuple(losses),
        expected=tuple(expected),
        blocks=depth(job.model()),
        outputs=outputs,
        loss=loss,
        gradients=gradients,
        parameters=parameters,
        buffers=buffers,
        splits=told.get("splits", {}),
        whole=told.get("whole", {}),
        cause=_cause(outputs, loss, gradients, parameters, buffers, reference, found, plan),
    )


def _train(
    job: TrainJob, plan: Plan, mesh: Mesh, prepared: Prepared, steps: int, *, places: int = 0
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and by name the gradients of the first step and the parameters after the last, of what this rank holds.

    One rank goes through the microbatches of all `places` on the data axis.
    """
    replica = build_replica(job, plan, mesh)
    optimizers = Optimizers(replica.module, job)
    kept: dict[str, Tensor] = {}
    handles = [each.register_step_pre_hook(lambda *_: _keep(replica, kept)) for each in optimizers.optimizers]
    losses = []
    watched = _Outputs(job.loss, kept, places=places, place=replica.axis.rank)
    for number, local in enumerate(_shares(job, plan, mesh, prepared, steps, places)):
        optimizers.schedule(number)
        first = number == 0 and job.coupled != "gather"  # there everybody's loss sees everything
        watched.expect([len(each.micro) for each in local] if first else [])
        micro = [replace(one, batch=shorter(one.batch)) for each in local for one in each.micro]
        found = step(replica, optimizers.optimizers, micro, loss=watched, forward=job.forward, clip_norm=job.clip_norm)
        losses.append(found.loss)
    for handle in handles:
        handle.remove()
    kept |= {f"parameter/{name}": p.detach().clone() for name, p in replica.named()}
    names = {id(buffer): name for name, buffer in replica.module.named_buffers()}
    kept |= {f"buffer/{names[id(b)]}": b.detach().clone() for b in replica.buffers() if b.is_floating_point()}
    replica.close()
    return losses, kept


class _Outputs:
    """The job's loss, which keeps what the model gave for each microbatch of the first step."""

    def __init__(self, loss: Callable[[Any, Any], Any], kept: dict[str, Tensor], *, places: int, place: int) -> None:
        self._loss, self._kept = loss, kept
        self._first = 0 if places else place
        self._names: list[str] = []
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)

    def expect(self, counts: Sequence[int]) -> None:
        """The microbatches that come now, of one place on the data axis after the other."""
        self._names = [
            f"place {self._first + at} microbatch {i}" for at, count in enumerate(counts) for i in range(count)
        ]

    def __call__(self, output: Any, batch: Any) -> Any:
        leaves = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        watched = _get_current_dispatch_mode() is not None  # a run that only shows how values flow
        if self._names and not watched and torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            name = self._names.pop(0)
            self._kept |= {f"output/{name} leaf {i}": leaf.detach().clone() for i, leaf in enumerate(leaves)}
        return self._loss(output, batch)


def _keep(replica: Replica, kept: dict[str, Tensor]) -> None:
    for name, parameter in replica.named():
        if parameter.grad is not None:
            kept.setdefault(f"gradient/{name}", parameter.grad.detach().clone())


def _shares(
    job: TrainJob, plan: Plan, mesh: Mesh, prepared: Prepared, steps: int, places: int
) -> Iterator[list[LocalStep]]:
    axis = mesh.axis("batch")
    own = [(place, places) for place in range(places)] or [(axis.rank, axis.size)]
    opened = [
        open_batches(
            prepared.train,
            global_batch=job.global_batch,
            seed=job.seed,
            rank=place,
            ranks=ranks,
            steps=steps,
            logical_shards=job.logical_shards if plan.exact else None,
            microbatches=plan.microbatches,
        )
        for place, ranks in own
    ]
    try:
        for _ in range(steps):
            yield [next(each) for each in opened]
    finally:
        for each in opened:
            each.close()


def _largest(pairs: Mapping[str, tuple[float, float]]) -> Difference:
    errors = {name: abs(a - b) / max(abs(b), 1e-300) if a != b else 0.0 for name, (a, b) in pairs.items()}
    return _worst(errors)


def _differences(reference: Mapping[str, Tensor], found: list[dict[str, Tensor]], plan: Plan) -> Difference:
    """Of every rank that has the tensor; one that no rank has is as wrong as can be."""
    largest = max((float(t.norm()) for t in reference.values()), default=0.0)
    errors = {}
    for name, expected in reference.items():
        scale = max(float(expected.norm()), FLOOR * largest) or 1.0
        there = [
            float((rank[name] - _part(name, expected, rank[name], plan, number)).norm()) / scale
            for number, rank in enumerate(found)
            if name in rank
        ]
        errors[name.partition("/")[2]] = max(there, default=math.inf)
    kind = next(iter(reference), "").partition("/")[0]
    more = {name for rank in found for name in rank if name.startswith(f"{kind}/")} - set(reference)
    return _worst(errors | dict.fromkeys((name.partition("/")[2] for name in sorted(more)), math.inf))


def _part(name: str, expected: Tensor, found: Tensor, plan: Plan, rank: int) -> Tensor:
    """What `rank` has of a tensor where that is not the whole: gradients lie like the optimizer's states."""
    if found.shape == expected.shape:
        return expected
    kind, _, inner = name.partition("/")
    called = f"model/{inner}" if kind == "parameter" else f"optimizer/{inner}/gradient"
    part = expected.new_empty(found.shape)
    held = boxes(called, tuple(expected.shape), plan, rank)
    for box, at in zip(held, local_offsets(held), strict=True):
        part[Box(at, box.shape).slices] = expected[box.slices]
    return part


def _worst(errors: Mapping[str, float]) -> Difference:
    if not errors:
        return Difference()
    where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    first = next((name for name, error in errors.items() if not error <= TOLERANCE), "")
    return Difference(error=errors[where] if math.isfinite(errors[where]) else None, where=where, first=first)


def _cause(
    outputs: Difference,
    loss: Difference,
    gradients: Difference,
    parameters: Difference,
    buffers: Difference,
    reference: Mapping[str, Tensor],
    found: list[dict[str, Tensor]],
    plan: Plan,
) -> str:
    """The likely cause in one sentence; empty where all is well."""
    if loss.first == "step 1" or outputs.first:
        what = f"the output of {outputs.first}" if outputs.first else "the loss of the first step"
        return (
            f"{what} differs already, so the forward pass does: it depends on which samples share a microbatch, on the "
            "rank, on chance of its own, or on something that a part leaves to others beside what it returns."
        )
    if gradients.first and f"gradient/{gradients.first}" not in reference:
        return f"'{gradients.first}' has a gradient, where one device leaves it without one."
    if gradients.first:
        times = _factor(gradients.first, reference, found, plan)
        much = f": it is {times:.4g} times what it should be, so it was counted that often" if times else ""
        return f"the loss is the same, but the gradient of '{gradients.first}' is not{much}."
    if not any(name.startswith("gradient/") for name in reference):
        return "nothing was compared: no parameter had a gradient."
    if buffers.first:
        return f"the buffer '{buffers.first}' differs: it changes outside of the part that it belongs to."
    if parameters.first or loss.first:
        where = f"'{parameters.first}'" if parameters.first else f"the loss in {loss.first}"
        return f"the first gradients are the same, but {where} differs later: look at the optimizer and at buffers."
    return ""


def _factor(name: str, reference: Mapping[str, Tensor], found: list[dict[str, Tensor]], plan: Plan) -> float:
    """How many times its due a gradient is; 0 where that is not all."""
    for number, rank in enumerate(found):
        if (here := rank.get(f"gradient/{name}")) is not None:
            expected = _part(f"gradient/{name}", reference[f"gradient/{name}"], here, plan, number).flatten()
            times = float(here.flatten() @ expected / (expected @ expected))
            if float((here.flatten() - times * expected).norm()) <= TOLERANCE * float(here.norm()):
                return times
    return 0.0
