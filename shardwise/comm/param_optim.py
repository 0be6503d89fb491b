"""Optimizers of whole parameters that step what lies on a server, and whole again for a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.collectives import broadcast_all, gather_bytes, gather_rows
from shardwise.comm.group import Group
from shardwise.comm.param_flats import Flats
from shardwise.comm.param_store import ShardTensor, view
from shardwise.errors import SpecError

Optimizers = Sequence[torch.optim.Optimizer]

# They treat every element alike, so that a part of a tensor may be stepped as if it were a tensor.
ELEMENTWISE = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
)


def elementwise(optimizers: Optimizers) -> bool:
    """Whether tensors may be cut for these optimizers. Raises SpecError for one that no server can run."""
    kinds = [type(optimizer) for optimizer in optimizers]
    if torch.optim.LBFGS in kinds:
        raise SpecError(
            "LBFGS computes the loss again in its step, which a parameter server cannot. Use another optimizer, or "
            "sync=all_reduce."
        )
    return all(kind.__module__.startswith("torch.optim.") and kind.__name__ in ELEMENTWISE for kind in kinds)


class Rebased:
    """The user's own optimizers, their parameters exchanged for what lies on this rank's server, and back.

    `put` and `take` change `param_groups` and `state` in place: hooks, schedulers and references stay good.
    """

    def __init__(self, optimizers: Optimizers, named: Mapping[str, Tensor]) -> None:
        self.optimizers = list(optimizers)
        self._named = dict(named)
        self._names = {id(p): name for name, p in named.items()}
        self._whole = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        self._shard: list[ShardTensor] = []

    def put(self, shard: list[ShardTensor]) -> Optimizers:
        """What a `Store` asks for: from now on the optimizers step `shard`, with the state that they had of it."""
        self._shard = shard
        for optimizer, groups in zip(self.optimizers, self._whole, strict=True):
            state = dict(optimizer.state)
            optimizer.state.clear()
            for group, whole in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = []
                for p in whole:
                    for part in (part for part in shard if part.name == self._names[id(p)]):
                        group["params"].append(part.tensor)
                        if p in state:
                            optimizer.state[part.tensor] = {k: _part(v, p, part) for k, v in state[p].items()}
        return self.optimizers

    def take(self, flats: Flats, server: int | None, group: Group) -> Callable[[], None]:
        """Put the whole parameters and their gathered state back; what is returned undoes it. Collective over `group`.

        `server` is this rank's number as a server (None: it is none).
        """
        states = [self._gathered(number, flats, server, group) for number in range(len(self.optimizers))]
        before = [(dict(o.state), [list(g["params"]) for g in o.param_groups]) for o in self.optimizers]
        for optimizer, state, groups in zip(self.optimizers, states, self._whole, strict=True):
            _set(optimizer, state, groups)

        def undo() -> None:
            for optimizer, (state, groups) in zip(self.optimizers, before, strict=True):
                _set(optimizer, state, groups)

        return undo

    def drop(self) -> None:
        """The whole parameters again, without any state: that of other servers cannot be had."""
        for optimizer, groups in zip(self.optimizers, self._whole, strict=True):
            _set(optimizer, {}, groups)

    def _gathered(self, number: int, flats: Flats, server: int | None, group: Group) -> dict[Any, dict[str, Any]]:
        """The state of one optimizer, whole, by whole parameter."""
        optimizer = self.optimizers[number]
        held = {part.name: part for part in self._shard if part.tensor in optimizer.state}
        mine = {name: optimizer.state[part.tensor] for name, part in held.items()}
        told = [[name, key, *_described(value, held[name])] for name, st in mine.items() for key, value in st.items()]
        known: dict[tuple[str, str], tuple[int, str, Any, Any]] = {}
        for rank, raw in enumerate(gather_bytes(json.dumps(told).encode(), group)):
            for name, key, kind, about, value in json.loads(raw):
                known.setdefault((name, key), (rank, kind, about, value))
        found: dict[Any, dict[str, Any]] = {}
        alike = Alike(flats, server, group)
        for (name, key), (rank, kind, about, value) in sorted(known.items()):
            whole = self._named[name]
            if kind == "alike":
                part = held.get(name)
                gathered: Any = alike.gather(name, getattr(torch, about), mine[name][key] if part else None)
            elif kind == "tensor":
                gathered = (
                    mine[name][key].clone()
                    if rank == group.rank()
                    else torch.empty(value, dtype=getattr(torch, about), device=whole.device)
                )
                broadcast_all([gathered], group, root=rank)
            else:
                gathered = torch.tensor(value, dtype=getattr(torch, about)) if about else value
            found.setdefault(whole, {})[key] = gathered
        return found


class Alike:
    """Gathers state that lies like the parameters, a tensor at a time."""

    def __init__(self, flats: Flats, server: int | None, group: Group) -> None:
        self._flats = flats
        self._group = group
        told = [int(raw) for raw in gather_bytes(str(-1 if server is None else server).encode(), group)]
        self._ranks = [told.index(server) for server in range(flats.shards.servers)]

    def gather(self, name: str, dtype: torch.dtype, mine: Tensor | None) -> Tensor:
        """The whole tensor of what every server has of it in `mine`."""
        whole = self._flats.named[name]
        shards = self._flats.shards
        rows = [sum(box.shape[0] for box in shards.boxes(name, server)) for server in range(shards.servers)]
        is_table = any(table.name == name for table in shards.tables)
        width = whole.shape[1:] if is_table else ()
        part = torch.empty(0, *width, dtype=dtype, device=whole.device)
        if mine is not None:
            part = mine if is_table else _flattened(mine)
        counts = [0] * self._group.size()
        for server, rank in enumerate(self._ranks):
            counts[rank] = rows[server]
        joined = gather_rows(part, counts, self._group)
        return joined if is_table else view(joined, whole, 0)


def _part(value: Any, whole: Tensor, part: ShardTensor) -> Any:
    """What belongs to a part of a tensor of something that is kept for the whole of it."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != whole.shape or part.stop - part.start == whole.numel() or part.tensor.shape == whole.shape:
        return value.clone()
    if part.tensor.dim() == whole.dim() and part.tensor.shape[1:] == whole.shape[1:] and whole.dim() > 1:
        return value[part.start : part.stop].clone()
    return _flattened(torch.empty_like(whole, dtype=value.dtype).copy_(value))[part.start : part.stop].clone()


def _flattened(tensor: Tensor) -> Tensor:
    """Its elements in the order in which they lie in memory, as the flats have them."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor.reshape(-1)


def _described(value: Any, part: ShardTensor) -> tuple[str, str, Any]:
    """How a state value is to be gathered: kind, dtype, and its shape or the value itself."""
    if not isinstance(value, Tensor):
        return "plain", "", value
    dtype = str(value.dtype).removeprefix("torch.")
    if value.shape == part.tensor.shape and value.dim() > 0:
        return "alike", dtype, None
    if value.dim() == 0 and part.tensor.dim() > 0:
        return "plain", dtype, value.item()
    return "tensor", dtype, list(value.shape)


def _set(optimizer: torch.optim.Optimizer, state: Mapping[Any, Any], groups: Iterable[list[Tensor]]) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = params
