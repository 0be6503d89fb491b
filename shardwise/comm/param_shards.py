"""Which server has which elements of which tensor: a pure function of their names, shapes and the number of servers.

    flat 0                                 flat 1: a large tensor has a flat of its own
    | b1 | w1      | b0 | w0   | gap |     | embedding                     |
    | server 0        | server 1     |     | server 0      | server 1      |

Tensors lie one after the other in flats; every flat has one piece of the same length for each server, so a flat is
reduce-scattered and all-gathered as it is, and a piece is one message. A tensor that is cut is held as elements of the
flattened tensor. Where an optimizer must see whole tensors none is cut: each goes to the server of its flat that has
least. Tables (embeddings with sparse gradients) are cut by rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from shardwise.comm.tree import Node, span
from shardwise.spec.layout import Box

ALIGN = 16  # elements: tensors and pieces begin on cache lines


class Fact(NamedTuple):
    """One tensor: its name, shape, bytes an element, and what it can share a flat with (dtype and device)."""

    name: str
    shape: tuple[int, ...]
    width: int
    kind: Hashable
    table: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Placed(NamedTuple):
    """A tensor in a flat, from element `offset` on."""

    name: str
    offset: int
    numel: int


class Flat(NamedTuple):
    """Tensors that lie one after the other, and the elements of each server's `piece`."""

    kind: Hashable
    placed: tuple[Placed, ...]
    piece: int


class Table(NamedTuple):
    """A tensor that is cut by rows: server s has `rows[s]`."""

    name: str
    rows: tuple[Node, ...]


class Held(NamedTuple):
    """Elements `start` to `stop` of the flattened tensor `name`, which lie from `at` on in the piece of a flat."""

    name: str
    start: int
    stop: int
    at: int


class Shards(NamedTuple):
    """The flats and tables of all tensors."""

    servers: int
    flats: tuple[Flat, ...]
    tables: tuple[Table, ...]

    def held(self, flat: int, server: int) -> list[Held]:
        """What `server` has of a flat, in the order in which it lies there."""
        piece = self.flats[flat].piece
        first, last = server * piece, (server + 1) * piece
        found = []
        for name, offset, numel in self.flats[flat].placed:
            start, stop = max(first, offset), min(last, offset + numel)
            if start < stop:
                found.append(Held(name, start - offset, stop - offset, start - first))
        return found

    def boxes(self, name: str, server: int) -> tuple[Box, ...]:
        """The elements of the flattened tensor that `server` has; of a table, its rows."""
        rows = [table.rows[server] for table in self.tables if table.name == name]
        flats = [held for i in range(len(self.flats)) for held in self.held(i, server) if held.name == name]
        runs = [*((node.start, node.stop) for node in rows), *((held.start, held.stop) for held in flats)]
        return tuple(Box((start,), (stop - start,)) for start, stop in runs if start < stop)


def place(tensors: Sequence[Fact], servers: int, limit_bytes: int, *, cut: bool = True) -> Shards:
    """Place `tensors` (in the order in which their gradients come) on `servers`.

    A flat holds one kind and closes before it would exceed `limit_bytes`. With `cut` every server has as many elements
    of a flat as any other; without, no tensor is cut, and the servers differ by the size of a tensor.
    """
    open_flats: dict[Hashable, list[Fact]] = {}
    closed: list[tuple[Hashable, list[Fact]]] = []
    for fact in tensors:
        if fact.table:
            continue
        members = open_flats.setdefault(fact.kind, [])
        if members and sum(f.numel * f.width for f in [*members, fact]) > limit_bytes:
            closed.append((fact.kind, members))
            members = open_flats[fact.kind] = []
        members.append(fact)
    closed += open_flats.items()
    order = {fact.name: number for number, fact in enumerate(tensors)}
    closed.sort(key=lambda flat: order[flat[1][-1].name])  # the flat that is complete first comes first
    lay = _cut if cut else _whole
    tables = [
        Table(f.name, tuple(span(server, servers, f.shape[0]) for server in range(servers))) for f in tensors if f.table
    ]
    return Shards(servers, tuple(lay(kind, members, servers) for kind, members in closed), tuple(tables))


def _cut(kind: Hashable, members: Sequence[Fact], servers: int) -> Flat:
    placed, end = [], 0
    for fact in members:
        placed.append(Placed(fact.name, end, fact.numel))
        end += _aligned(fact.numel)
    return Flat(kind, tuple(placed), _aligned(-(-end // servers)))


def _whole(kind: Hashable, members: Sequence[Fact], servers: int) -> Flat:
    """Largest first, each to the server that has least."""
    regions: list[list[Fact]] = [[] for _ in range(servers)]
    loads = [0] * servers
    for fact in sorted(members, key=lambda f: -f.numel):
        lightest = loads.index(min(loads))
        regions[lightest].append(fact)
        loads[lightest] += _aligned(fact.numel)
    piece = max(loads)
    placed = []
    for server, facts in enumerate(regions):
        at = server * piece
        for fact in facts:
            placed.append(Placed(fact.name, at, fact.numel))
            at += _aligned(fact.numel)
    return Flat(kind, tuple(placed), piece)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGN) * ALIGN
