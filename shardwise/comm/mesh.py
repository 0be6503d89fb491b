"""`connect`: the ranks of a plan find each other, and every axis longer than one rank gets its `Group`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed.distributed_c10d as dist

from shardwise.comm.group import NAME, Group, GroupSettings, register
from shardwise.comm.store import own_address
from shardwise.comm.timeline import HostClock, StreamClock, Timeline
from shardwise.comm.traffic import described
from shardwise.errors import ClusterError, CommError, SpecError
from shardwise.spec.plan import AXES, Plan

BATCH = ("data", "shard")  # the axes whose ranks have samples of their own


class Axis(NamedTuple):
    """One axis of the mesh as this rank sees it: its own place, the length, and the group (None when alone)."""

    name: str
    rank: int
    size: int
    group: Group | None


class Mesh:
    """The ranks of a plan, connected. Made by `connect`; after `abort` or `close` a new one must be connected."""

    def __init__(
        self, plan: Plan, rank: int, world: int, device: torch.device, groups: dict[str, Group], owns_world: bool
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.world = world
        self.device = device
        self._groups = groups
        self._owns_world = owns_world
        self._extra: list[Group] = []
        self.timeline = Timeline()

    def obey(self, plan: Plan) -> None:
        """Take another plan of as many ranks; axes of other lengths get new groups. Every rank of the mesh calls it."""
        before, self.plan = self.plan, plan
        if any(getattr(before, axis) != getattr(plan, axis) for axis in AXES):
            settings = next(iter(self._groups.values())).settings
            self._extra += [group for group in self._groups.values() if group is not dist.group.WORLD]
            self._groups = _axis_groups(plan, self.rank, self.world, settings, owns_world=self._owns_world)

    def axis(self, name: str) -> Axis:
        """The axis called `name`; `batch` is data and shard together, the ranks that have samples of their own. Raises
        SpecError for a name that is not one of the plan's axes."""
        if name == "batch":
            return self._batch()
        if name not in AXES:
            raise SpecError(f"'{name}' is no axis of a plan; the axes are {', '.join(AXES)}.")
        place = self.plan.coordinates(self.rank)[name]
        return Axis(name, place, getattr(self.plan, name), self._groups.get(name))

    def _batch(self) -> Axis:
        data, shard = self.axis("data"), self.axis("shard")
        if data.size > 1 and shard.size > 1:
            place = data.rank * shard.size + shard.rank
            return Axis("batch", place, data.size * shard.size, self._groups["batch"])
        return data if shard.size == 1 else shard

    def second_group(self, name: str, purpose: str = "statistics") -> Group | None:
        """A further group over the ranks of an axis, with an order of its own; every rank of the mesh must call it."""
        group = self.axis(name).group
        if group is None:
            return None
        lines = _lines(self.plan, *(BATCH if name == "batch" else (name,)))
        made = _make_groups(lines, self.rank, f"{name} {purpose}", group.settings)
        self._extra.append(made)
        return made

    def axes(self) -> list[dict[str, Any]]:
        """For each axis longer than one rank its name, its length and its backend, as an event tells it."""
        return [
            {"axis": name, "ranks": group.size(), "backend": group.transport} for name, group in self._groups.items()
        ]

    def traffic(self) -> list[dict[str, Any]]:
        """For each group what this rank exchanged in it, as an event tells it (`traffic.described`).

        What its connections carried is as of the last call while they stood: call it before the others may leave.
        """
        return [described(group) for group in self._each_group()]

    def waited_s(self) -> float:
        """Seconds that this thread has waited for the operations of all groups so far."""
        return sum(group.waits.seconds() for group in self._each_group())

    def recording(self) -> AbstractContextManager[Callable[[], dict[str, Any]]]:
        """Record in this block what this thread does and exchanges (`Timeline.recording`)."""
        clock = StreamClock() if self.device.type == "cuda" else HostClock()
        return self.timeline.recording(self._each_group(), clock)

    def wire(self) -> dict[str, tuple[int, int]]:
        """For each operation: how often it was called on this rank, and the bytes handed to the backend."""
        total: dict[str, tuple[int, int]] = {}
        for group in self._each_group():
            for op, (messages, moved) in group.wire.items():
                had = total.get(op, (0, 0))
                total[op] = (had[0] + messages, had[1] + moved)
        return total

    def abort(self) -> None:
        """Free every caller that waits in any group of this mesh, from any thread; nothing here can be used again."""
        for group in self._each_group():
            group.abort()

    def close(self) -> None:
        """End the groups. Collective only in the sense that ranks that still wait get an error."""
        for group in self._each_group():
            group.shutdown()
            with contextlib.suppress(ValueError, RuntimeError, AssertionError):
                if not self._owns_world or group is not dist.group.WORLD:
                    dist.destroy_process_group(group)
        if self._owns_world and dist.is_initialized():
            with contextlib.suppress(ValueError, RuntimeError, AssertionError):
                dist.destroy_process_group()
        self._groups.clear()
        self._extra.clear()

    def _each_group(self) -> list[Group]:
        return list({id(g): g for g in [*self._extra, *self._groups.values()]}.values())


def connect(
    plan: Plan,
    *,
    rank: int,
    world: int,
    store: dist.Store | None,
    device: str = "cpu",
    timeout_s: float = 600,
    generation: int = 0,
    host: str | None = None,
    threads: int = 1,
) -> Mesh:
    """Connect this rank to the others of `plan`; every rank calls it once for each generation.

    With `world` == 1 there is no group, no store and no socket. gloo listens on `host`; without one, on loopback
    when all ranks share this host, else on this host's address towards the store (`GLOO_SOCKET_IFNAME` overrides it).

    Raises SpecError when the plan has another number of ranks, ClusterError for a device that is not there, CommError
    when the others do not answer in `timeout_s` seconds.
    """
    if plan.ranks != world:
        raise SpecError(f"the plan {plan} has {plan.ranks} ranks but {world} were started. Start {plan.ranks} ranks.")
    target = _device(device)
    if world == 1:
        return Mesh(plan, rank, world, target, {}, owns_world=False)
    register()
    devices = ("cpu",) if target.type == "cpu" else ("cpu", target.type)
    if host is None and store is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        host = own_address(dist.PrefixStore(f"hosts-{generation}", store), rank, world)
    settings = GroupSettings(devices, host, threads, float(timeout_s), generation)
    owns_world = not dist.is_initialized()
    if owns_world:
        _init_world(store, rank, world, settings)
    groups = _axis_groups(plan, rank, world, settings, owns_world=owns_world)
    return Mesh(plan, rank, world, target, groups, owns_world)


def _axis_groups(plan: Plan, rank: int, world: int, settings: GroupSettings, *, owns_world: bool) -> dict[str, Group]:
    """The groups of the axes that are longer than one rank."""
    groups: dict[str, Group] = {}
    lines_of = {axis: _lines(plan, axis) for axis in AXES if getattr(plan, axis) > 1}
    if plan.data > 1 and plan.shard > 1:
        lines_of["batch"] = _lines(plan, *BATCH)
    for axis, lines in lines_of.items():
        default = dist.group.WORLD
        if len(lines[0]) == world and isinstance(default, Group) and owns_world:
            default.setGroupDesc(axis)
            groups[axis] = default
        else:
            groups[axis] = _make_groups(lines, rank, axis, settings)
    return groups


def _init_world(store: dist.Store | None, rank: int, world: int, settings: GroupSettings) -> None:
    if store is None:
        raise CommError(f"rank {rank} has no store to find the other {world - 1} rank(s) in. Open one with open_store.")
    try:
        dist.init_process_group(
            NAME,
            store=dist.PrefixStore(f"generation-{settings.generation}", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=settings.timeout_s),
            pg_options=settings,
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"rank {rank} could not meet the other {world - 1} rank(s) within {settings.timeout_s:g} s: "
            f"{str(error).splitlines()[0]} Look at the logs of the other ranks."
        ) from None


def _make_groups(lines: list[list[int]], rank: int, name: str, settings: GroupSettings) -> Group:
    """One group for each line of ranks, all made by all ranks in one order; the one that `rank` is in."""
    mine: Group | None = None
    for line in lines:
        made = dist.new_group(
            line,
            timeout=timedelta(seconds=settings.timeout_s),
            backend=NAME,
            pg_options=settings,
            group_desc=name,
        )
        if rank in line:
            mine = made
    assert isinstance(mine, Group), (lines, rank)
    return mine


def _lines(plan: Plan, *axes: str) -> list[list[int]]:
    """The ranks that differ on `axes` only, as one list for each choice of the other axes."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(plan.ranks):
        place = plan.coordinates(rank)
        found.setdefault(tuple(v for k, v in place.items() if k not in axes), []).append(rank)
    return list(found.values())


def _device(device: str) -> torch.device:
    """Raises ClusterError for a device that this torch or this host does not have."""
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ClusterError(f"device='{device}' is no device that torch knows. Use cpu, cuda or cuda:0.") from None
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ClusterError(f"device='{device}', but torch sees no CUDA device here. Use device='cpu'.")
        torch.cuda.set_device(target)
    elif target.type != "cpu":
        raise ClusterError(f"device='{device}' is not supported; ranks run on cpu or cuda.")
    return target
