"""`Rows`: parameters cut by rows over the ranks of the shard axis, one after the other in one message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn


@dataclass(slots=True)
class Cut:
    """A parameter and this rank's rows of it.

    `whole` is what forward computes with and what autograd gives gradients to. `own` is what the module has at rest and
    the optimizer updates: with zero=3 another parameter, with this rank's rows alone, else the same one.
    """

    name: str
    whole: nn.Parameter
    own: nn.Parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)  # (module, attribute)


class Rows:
    """How tensors of these shapes are cut over `ranks`: chunks of as many rows (dim 0), the last ones shorter or empty.

    `size` are the elements that a rank has of all of them together, with what fills up short chunks.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], ranks: int) -> None:
        self._ranks = ranks
        self._chunks = [-(-shape[0] // ranks) for shape in shapes]
        self._shapes = [tuple(shape) for shape in shapes]
        self._lengths = [chunk * prod(shape[1:]) for chunk, shape in zip(self._chunks, self._shapes, strict=True)]
        self.size = sum(self._lengths)

    def own(self, index: int, whole: Tensor, rank: int) -> Tensor:
        """The rows of tensor number `index` that `rank` has: a view."""
        chunk = self._chunks[index]
        return whole[min(rank * chunk, len(whole)) : min((rank + 1) * chunk, len(whole))]

    def pack(self, wholes: Sequence[Tensor | None], packed: Tensor) -> None:
        """Whole tensors into `packed` [ranks, size or more], the part of each rank by itself; None are zeros."""
        table, start = packed.view(self._ranks, -1), 0
        for whole, length in zip(wholes, self._lengths, strict=True):
            place = table[:, start : start + length]
            start += length
            if whole is None:
                place.zero_()
                continue
            flat = whole.reshape(-1)
            full, rest = divmod(flat.numel(), length) if length else (0, 0)
            place[:full].copy_(flat[: full * length].view(full, length))
            place[full:].zero_()
            if rest:
                place[full, :rest].copy_(flat[full * length :])

    def unpack(self, packed: Tensor, wholes: Sequence[Tensor]) -> None:
        """The inverse of `pack`."""
        table, start = packed.view(self._ranks, -1), 0
        for whole, length in zip(wholes, self._lengths, strict=True):
            place = table[:, start : start + length]
            start += length
            flat = whole.view(-1)
            full, rest = divmod(flat.numel(), length) if length else (0, 0)
            flat[: full * length].view(full, length).copy_(place[:full])
            if rest:
                flat[full * length :].copy_(place[full, :rest])

    def pack_own(self, owns: Sequence[Tensor], piece: Tensor) -> None:
        """One rank's rows into its part [size] of a message."""
        start = 0
        for own, length in zip(owns, self._lengths, strict=True):
            piece[start : start + own.numel()].copy_(own.reshape(-1))
            start += length

    def views(self, piece: Tensor, rank: int) -> list[Tensor]:
        """The rows of each tensor in one rank's part [size] of a message."""
        found, start = [], 0
        for shape, chunk, length in zip(self._shapes, self._chunks, self._lengths, strict=True):
            rows = max(0, min(chunk, shape[0] - rank * chunk))
            found.append(piece[start : start + rows * prod(shape[1:])].view(rows, *shape[1:]))
            start += length
        return found
