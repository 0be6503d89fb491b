"""Which part of each parameter a rank updates, where the tensor and shard axes leave it a part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import torch
from torch import Tensor

from shardwise.comm.mesh import Mesh
from shardwise.parallel.low_bit import BLOCK, codes_of
from shardwise.parallel.rows import Rows
from shardwise.parallel.slots import CODES, SCALES
from shardwise.spec.layout import Box, boxes, local_offsets
from shardwise.spec.plan import Plan


class Part:
    """A rank's part of the parameters; without a mesh all of them. `shapes` are those of whole parameters, `split` the
    names of those that the tensor axis cuts."""

    def __init__(
        self,
        plan: Plan | None = None,
        mesh: Mesh | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        split: Collection[str] = (),
    ) -> None:
        self._plan, self._rank = plan or Plan(), mesh.rank if mesh is not None else 0
        self._shapes, self._split = shapes or {}, split
        self._shard = mesh.axis("shard").group if mesh is not None else None
        self.cut = self._plan.shard > 1 or self._plan.tensor > 1

    @property
    def by_rows(self) -> bool:
        """Whether parameters are whole between steps, and each rank updates its rows."""
        return self._shard is not None and self._plan.zero < 3

    def rows(self, whole: Tensor) -> Tensor:
        """What this rank updates of a parameter as it has it: a view."""
        if self._shard is None or not self.by_rows or not whole.dim():
            return whole
        return Rows([whole.shape], self._shard.size()).own(0, whole, self._shard.rank())

    def whole(self, rows: Tensor, like: Tensor) -> Tensor:
        """The rows of all ranks together, in the shape of `like`, which they are rows of. Collective."""
        if self._shard is None:
            return rows.clone()
        every = Rows([like.shape], self._shard.size())
        piece = rows.new_zeros(every.size)
        every.pack_own([rows], piece)
        packed, found = piece.new_empty(every.size * self._shard.size()), rows.new_empty(like.shape)
        self._shard.all_gather_single(packed, piece).wait()
        every.unpack(packed, [found])
        return found

    def elements(self, name: str, parameter: Tensor) -> int:
        """Of the whole parameter: what is decided by size is alike on all ranks."""
        return prod(self._shapes.get(name, parameter.shape))

    def place(self, name: str) -> str:
        """Alike on ranks that have the same elements of a parameter, and on no others; empty where that is all."""
        at = self._plan.coordinates(self._rank)
        tensor = [f" tensor {at['tensor']}"] if name in self._split else []
        return "".join(tensor + [f" shard {at['shard']}"] * (self._plan.shard > 1))

    def widened(self, name: str, state: Mapping[str, Tensor], *, signed: bool) -> Tensor:
        """A state in 8 bits, with this rank's part of the codes and all scales of the whole parameter, in float32."""
        codes, whole = state[CODES], self._shapes[name]
        blocks = torch.empty(codes.shape, dtype=torch.int64)
        called = name.replace("%", "%25").replace("/", "%2F")
        held = boxes(f"optimizer/{called}/state", whole, self._plan, self._rank)
        for box, start in zip(held, local_offsets(held), strict=True):
            index = torch.zeros((), dtype=torch.int64)
            for extent, first, size in zip(whole, box.offset, box.shape, strict=True):
                index = index[..., None] * extent + torch.arange(first, first + size)
            blocks[Box(start, box.shape).slices] = index // BLOCK
        return codes_of(signed).to(codes.device)[codes.int()] * state[SCALES][blocks.to(codes.device)]
