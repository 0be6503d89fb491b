"""A rank's parameters and gradients as the flats of a parameter server."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardwise.comm.param_shards import Fact, Shards, place
from shardwise.comm.param_store import Zeros, view


class Flats:
    """Parameters become views of `values[i]`, one flat tensor for each flat of `shards`; `grads[i]` is laid out alike.

    `tables` stay where they are. `restore` gives the parameters memory of their own again.
    """

    def __init__(self, shards: Shards, named: Mapping[str, Tensor], zeros: Zeros) -> None:
        self.shards = shards
        self.named = dict(named)
        self.tables = [named[table.name].detach() for table in shards.tables]
        self.values: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.grad_views: dict[str, Tensor] = {}
        with torch.no_grad():
            for flat in shards.flats:
                like = named[flat.placed[0].name]
                values, grads = (zeros(flat.piece * shards.servers, like.dtype, like.device) for _ in range(2))
                for name, offset, _ in flat.placed:
                    value = view(values, named[name], offset)
                    value.copy_(named[name])
                    self.grad_views[name] = view(grads, named[name], offset)
                    named[name].data = value
                self.values.append(values)
                self.grads.append(grads)

    def piece(self, tensor: Tensor, flat: int, server: int) -> Tensor:
        """The part of one of the flat tensors that belongs to a server."""
        size = self.shards.flats[flat].piece
        return tensor[server * size : (server + 1) * size]

    def rows(self, server: int) -> list[Tensor]:
        """A server's rows of each table."""
        places = [table.rows[server] for table in self.shards.tables]
        return [table[node.start : node.stop] for table, node in zip(self.tables, places, strict=True)]

    def restore(self) -> None:
        """Leave the parameters as they were found, but for their values."""
        for flat in self.shards.flats:
            for name, _, _ in flat.placed:
                self.named[name].data = self.named[name].data.clone()


def place_tensors(
    named: Mapping[str, Tensor], servers: int, limit_bytes: int, *, tables: tuple[str, ...] = (), cut: bool = True
) -> Shards:
    """Where the elements of these parameters lie; their gradients come in the opposite order."""
    facts = [
        Fact(name, tuple(t.shape), t.element_size(), (str(t.dtype), str(t.device)), name in tables)
        for name, t in reversed(list(named.items()))
    ]
    return place(facts, servers, limit_bytes, cut=cut)
