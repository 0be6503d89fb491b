"""Which rank this process is: set by the worker, read from a launcher's environment, or alone."""

from __future__ import annotations

import os

import msgspec

from shardwise.cluster.env import from_environment
from shardwise.comm.mesh import Mesh, connect
from shardwise.comm.store import LOOPBACK, environment_store
from shardwise.errors import SpecError
from shardwise.spec.plan import Plan
from shardwise.train.folder import RunFolder

JOIN_LIMIT_S = 120.0


class Context(msgspec.Struct, frozen=True):
    """This rank's mesh, and the run folder that its launcher opened (None when nobody did)."""

    mesh: Mesh
    run: RunFolder | None


_current: Context | None = None  # a process is one rank for as long as it lives
_launched = False  # whether a launcher of ours started this process


def enter(context: Context) -> None:
    """Say which rank this process is. Called once, by the worker."""
    global _current
    _current = context


def current(plan: Plan | None = None) -> Context:
    """The context of this process; one rank alone when nobody started it as one of several."""
    global _current
    if _current is None:
        _current = Context(_connect(plan), None)
    if plan is not None and plan.ranks != _current.mesh.world:
        raise SpecError(
            f"the plan {plan} has {plan.ranks} ranks, but this script runs on {_current.mesh.world}. "
            f"Start it with: shardwise train SCRIPT --plan data={plan.ranks}."
        )
    return _current


def mark_launched() -> None:
    """Say that a launcher of ours started this process; before any code of the user runs."""
    global _launched
    _launched = True


def launched() -> bool:
    """True in a process that a launcher of ours started."""
    return _launched


def device_of(local_rank: int) -> str:
    """The CUDA device of this rank, or the CPU where there is none."""
    import torch

    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _connect(plan: Plan | None) -> Mesh:
    place = from_environment(os.environ)
    if place is None:
        return connect(plan or Plan(), rank=0, world=1, store=None, device=device_of(0))
    store = None
    if place.world > 1:
        found = (place.rank, place.world, place.master_addr, place.master_port, JOIN_LIMIT_S)
        store = environment_store(*found, agent_store=place.agent_store)
    chosen = plan or Plan(data=place.world)
    host = LOOPBACK if place.local_world == place.world else None  # several hosts do not meet on loopback
    device = device_of(place.local_rank)
    return connect(chosen, rank=place.rank, world=place.world, store=store, device=device, host=host)


def agree(mesh: Mesh, text: str) -> str:
    """Rank 0's text, on every rank."""
    if mesh.world == 1:
        return text
    import torch
    import torch.distributed as dist

    size = torch.tensor([len(text.encode())])
    dist.broadcast(size, 0)
    raw = torch.zeros(int(size), dtype=torch.uint8)
    if mesh.rank == 0:
        raw.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
    dist.broadcast(raw, 0)
    return bytes(raw.tolist()).decode()
