"""The splits of a job's model over the tensor axis, found by one rank and obeyed by all."""

from __future__ import annotations

import gc
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from msgspec import structs
from torch import Tensor

from shardwise import errors, events
from shardwise.comm.mesh import Mesh
from shardwise.data.source import Prepared
from shardwise.models.partial import build_part, copy_without_memory
from shardwise.parallel.allocator import give_back_freed_memory
from shardwise.parallel.blame import user_code
from shardwise.spec.job import TrainJob
from shardwise.spec.plan import Plan, Split
from shardwise.train.context import agree
from shardwise.train.probe import example_of

if TYPE_CHECKING:
    from torch import nn


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the rank that searched tells the others: what it found, or the kind and text of its error."""

    splits: dict[str, Split] = {}
    whole: dict[str, str] = {}
    kind: str = ""
    text: str = ""

    @property
    def hows(self) -> dict[str, str]:
        return {name: split.how for name, split in self.splits.items()}


def split_here(job: TrainJob, plan: Plan, mesh: Mesh, prepared: Prepared) -> Plan:
    """The plan with all its splits over the tensor axis (`agreed_splits`); says in an event what stays whole."""
    told = agreed_splits(job, plan, mesh, prepared)
    if mesh.rank == 0:
        events.emit("splits", splits=told.hows, whole=told.whole)
    return structs.replace(plan, splits=told.splits)


def agreed_splits(job: TrainJob, plan: Plan, mesh: Mesh, prepared: Prepared) -> Told:
    """What rank 0 finds from the model itself, on every rank; so is an error there. Collective."""
    told, error = Told(), None
    if mesh.rank == 0:
        try:
            told = found_splits(job, plan, prepared)
        except Exception as one:  # the others wait for an answer
            kind = type(one).__name__ if isinstance(one, errors.ShardwiseError) else "JobError"
            told, error = Told(kind=kind, text=str(one) or type(one).__name__), one
    told = msgspec.json.decode(agree(mesh, msgspec.json.encode(told).decode()), type=Told)
    if error is not None:
        raise error
    if told.kind:
        raise getattr(errors, told.kind)(told.text)
    return told


def found_splits(job: TrainJob, plan: Plan, prepared: Prepared, *, folder: str = "") -> Told:
    """The splits of the job's model for `plan.tensor` ranks, and by pattern what stays whole and why.

    No parameter is in memory but those that an operation, or the proof of a block, has values for. Raises JobError,
    SpecError as `find_splits` does.
    """
    from shardwise.parallel.tensor.find import find_splits, patterned

    torch.manual_seed(job.seed)
    with user_code("model of the job", folder=folder):
        built = build_part(job.model, lambda *_: ())
    module: nn.Module = built.module if built.by_part else copy_without_memory(built.module)  # it may be the user's own
    example: Any = example_of(job, prepared, folder=folder)
    found = find_splits(
        module,
        example,
        plan.tensor,
        forward=job.forward,
        asked=plan.splits,
        values=chance_values if built.by_part else None,
        sequence=plan.sequence,
    )
    names = [name for name, _ in module.named_parameters()]
    gc.collect()  # graphs and modules hold each other, and the values of a block
    give_back_freed_memory()
    return Told(splits=found.splits, whole=patterned(found.whole, names))


def chance_values(name: str, parameter: Tensor) -> Tensor:
    """Values by chance, of a size that keeps activations as large as they are; the same in every call."""
    if not parameter.is_floating_point():
        return parameter.detach()
    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    made = torch.empty(parameter.shape, dtype=torch.float32)
    if parameter.dim() > 1:
        reach = (3 * parameter.shape[0] / max(1, parameter.numel())) ** 0.5
        made.uniform_(-reach, reach, generator=chance)
    else:
        made.uniform_(0.5, 1.0, generator=chance)  # a norm's scale; a variance is not below zero
    return made.to(parameter.device, parameter.dtype)
