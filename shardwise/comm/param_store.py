"""What one server of a parameter server keeps: its pieces of the parameters, sums of gradients, the optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.comm.param_shards import Shards

Zeros = Callable[[int, torch.dtype, torch.device], Tensor]  # a 1-D tensor of zeros


class ShardTensor(NamedTuple):
    """A server's part of the parameter `name`: elements `start` to `stop` of it flattened (of a table: rows).

    A parameter that is not cut has its own shape here; the elements of one that is cut are 1-D.
    """

    name: str
    start: int
    stop: int
    tensor: Tensor


Optimize = Callable[[list[ShardTensor]], Sequence[torch.optim.Optimizer]]


class Push(NamedTuple):
    """What a worker says of its gradients: they are `scale` times those of its `loss_sum` over `weight` elements.

    `expected` is the weight of all workers' gradients of a clock together, as the worker guesses it; `used` says of
    each tensor whether it has a gradient.
    """

    loss_sum: float
    weight: float
    scale: float
    expected: float
    used: tuple[bool, ...]


NOTHING = Push(0.0, 0.0, 1.0, 0.0, ())


class Gradients:
    """The pieces of one gradient, or of a sum of several, that belong to one server.

    `pieces[i]` is of flat i; `rows[t]` are indices (counted from the server's first row) and rows of table t.
    """

    def __init__(self, store: Store) -> None:
        self.pieces = [torch.zeros_like(piece) for piece in store.pieces]
        self.views = store.views(self.pieces)
        self.rows: list[list[tuple[Tensor, Tensor]]] = []
        self.clear(len(store.shards.tables))

    def clear(self, tables: int) -> None:
        self.rows = [[] for _ in range(tables)]
        self.weight = 0.0
        self.scale = 1.0
        self.used: set[int] = set()
        self.empty = True

    def take(self, said: Push, other: Gradients) -> None:
        """Become `other`'s gradients, or add them, whatever they were scaled with."""
        factor = 1.0
        if self.empty:
            self.scale = said.scale
            self.pieces, other.pieces, self.views, other.views = other.pieces, self.pieces, other.views, self.views
        else:
            factor = self.scale / said.scale
            for mine, piece in zip(self.pieces, other.pieces, strict=True):
                mine.add_(piece, alpha=factor)
        for mine_rows, rows in zip(self.rows, other.rows, strict=True):
            mine_rows += [(at, values if factor == 1.0 else values * factor) for at, values in rows]
        self.weight += said.weight
        self.used.update(number for number, used in enumerate(said.used) if used)
        self.empty = False


class Store:
    """One server's parameters and optimizers; whoever calls it holds the server's lock.

    `pieces` are its pieces of the flats, `tables` its rows of the tables, both changed in place; `like` has all
    parameters by name, for their shapes. `optimize` makes the optimizers of what lies here (none is fine), and
    `schedule(clock)` is called before each update, to set their rates.
    """

    def __init__(
        self,
        shards: Shards,
        server: int,
        like: Mapping[str, Tensor],
        pieces: Sequence[Tensor],
        tables: Sequence[Tensor],
        optimize: Optimize,
        schedule: Callable[[int], object] | None = None,
    ) -> None:
        self.shards = shards
        self.server = server
        self.pieces = list(pieces)
        self.tables = list(tables)
        self.version = 0  # how many updates there were
        self.changed = [torch.zeros(len(table), dtype=torch.int64) for table in tables]  # at which one a row was
        self.like = like
        self._numbers = {name: number for number, name in enumerate(like)}
        self._free: list[Gradients] = []
        self._schedule = schedule
        held = [held for i in range(len(shards.flats)) for held in shards.held(i, server)]
        rows = [table.rows[server] for table in shards.tables]
        self.tensors = [
            *(ShardTensor(h.name, h.start, h.stop, v) for h, v in zip(held, self.views(self.pieces), strict=True)),
            *(
                ShardTensor(table.name, mine.start, mine.stop, tensor)
                for table, mine, tensor in zip(shards.tables, rows, tables, strict=True)
                if len(tensor)
            ),
        ]
        self.optimizers = list(optimize(self.tensors)) if self.tensors else []

    def views(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The parts of parameters that lie in this server's pieces, in the order of `Shards.held`."""
        found = []
        for flat, piece in enumerate(pieces):
            for held in self.shards.held(flat, self.server):
                like = self.like[held.name]
                if held.stop - held.start == like.numel():
                    found.append(view(piece, like, held.at))
                else:
                    found.append(piece[held.at : held.at + held.stop - held.start])
        return found

    def spare(self) -> Gradients:
        """Room for one gradient; `put_back` it."""
        return self._free.pop() if self._free else Gradients(self)

    def put_back(self, gradients: Gradients) -> None:
        gradients.clear(len(self.tables))
        self._free.append(gradients)

    def update(self, clock: int, sums: Gradients, share: float = 1.0) -> None:
        """One step of the optimizers with the mean gradient; their rates count `share` of what they are.

        A tensor that nobody used keeps no gradient, so the optimizers leave it alone. Nothing happens without weight.
        """
        if self._schedule is not None:
            self._schedule(clock)
        if not sums.weight:
            return
        factor = 1.0 / (sums.scale * sums.weight)
        for piece in sums.pieces:
            piece.mul_(factor)
        self._give_rows(sums, factor)
        self.step(sums.views, sums.used, share)
        self.version += 1

    def step(self, views: Sequence[Tensor], used: set[int], share: float = 1.0) -> None:
        """Step the optimizers with gradients that are ready: `views` of all that is not a table."""
        for part, grad in zip(self.tensors, views, strict=False):
            part.tensor.grad = grad if self._numbers[part.name] in used else None
        with _share_of_rates(self.optimizers, share):
            for optimizer in self.optimizers:
                optimizer.step()
        for part in self.tensors:
            part.tensor.grad = None

    def _give_rows(self, sums: Gradients, factor: float) -> None:
        """Tables have gradients of the rows that were used: the others are not touched."""
        tables = {part.name: part.tensor for part in self.tensors[len(sums.views) :]}
        for number, (table, rows) in enumerate(zip(self.shards.tables, sums.rows, strict=True)):
            if rows and table.name in tables:
                at = torch.cat([indices for indices, _ in rows])
                values = torch.cat([values for _, values in rows]) * factor
                # checked: the indices came from another rank
                gradient = torch.sparse_coo_tensor(at[None], values, tables[table.name].shape, check_invariants=True)
                tables[table.name].grad = gradient.coalesce()
                self.changed[number][at] = self.version + 1


def view(flat: Tensor, like: Tensor, at: int) -> Tensor:
    """A tensor of the shape of `like` in `flat`, with its strides where they leave no gaps."""
    stride = like.stride()
    if not torch.ops.aten.is_non_overlapping_and_dense(like):
        stride = torch.empty(like.shape, device="meta").stride()
    return flat.as_strided(like.shape, stride, flat.storage_offset() + at)


@contextlib.contextmanager
def _share_of_rates(optimizers: Sequence[torch.optim.Optimizer], share: float) -> Iterator[None]:
    if share == 1.0:
        yield
        return
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group["lr"] * share
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
