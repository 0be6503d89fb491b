"""A reducer in miniature for the tests of lossy sums: named gradients in buckets, summed step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardwise.comm.compressed import CompressedSum
from shardwise.comm.exchange import Bucketed, Piece
from shardwise.comm.group import Group

Shapes = Mapping[str, tuple[int, ...]]
SHAPES: Shapes = {
    "embedding": (60, 33),
    "bias": (33,),
    "scale": (),
    "conv": (8, 4, 3, 3),
    "wide": (40, 500),
    "cut": (9,),
}
TAIL = 37


class Buckets:
    """Parameters `names` in buckets of `cuts` parameters each, padded as the reducer pads them; a tail in the last."""

    def __init__(self, shapes: Shapes, cuts: Sequence[Sequence[str]], dtype: torch.dtype = torch.float32) -> None:
        self.shapes = shapes
        self.layout: list[Bucketed] = []
        self.flats: list[Tensor] = []
        for number, names in enumerate(cuts):
            pieces, at = [], 0
            for name in names:
                pieces.append(Piece(name, at, shapes[name]))
                at += -(-math.prod(shapes[name]) // 16) * 16
            self.layout.append(Bucketed(at, dtype, torch.device("cpu"), tuple(pieces)))
            self.flats.append(torch.zeros(at + (TAIL if number == len(cuts) - 1 else 0), dtype=dtype))

    def views(self) -> dict[str, Tensor]:
        """The gradients, where they lie."""
        return {
            p.name: flat[p.offset : p.offset + math.prod(p.shape)].view(p.shape)
            for bucket, flat in zip(self.layout, self.flats, strict=True)
            for p in bucket.pieces
        }

    def step(
        self, exchange: CompressedSum, gradients: Mapping[str, Tensor], tail: Tensor, *, mean: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One step: all buckets are started, then waited for. The sums by name, and the tail's."""
        for name, view in self.views().items():
            view.copy_(gradients[name])
        self.flats[-1][self.layout[-1].numel :] = tail
        pending = []
        for number, (bucket, flat) in enumerate(zip(self.layout, self.flats, strict=True)):
            body, end = flat[: bucket.numel], flat[bucket.numel :]
            pending.append(exchange.start(number, flat, body, end, mean=mean))
        for each in pending:
            each.wait()
        self.assert_gaps_are_zero()
        return {name: view.clone() for name, view in self.views().items()}, self.flats[-1][-TAIL:].clone()

    def assert_gaps_are_zero(self) -> None:
        for bucket, flat in zip(self.layout, self.flats, strict=True):
            unused = torch.ones(bucket.numel, dtype=torch.bool)
            for piece in bucket.pieces:
                unused[piece.offset : piece.offset + math.prod(piece.shape)] = False
            assert not flat[: bucket.numel][unused].any(), bucket


TWO = (("cut", "wide", "conv"), ("scale", "bias", "embedding"))
ONE = (tuple(SHAPES),)


def gradients(rank: int, step: int, shapes: Shapes = SHAPES) -> dict[str, Tensor]:
    """What a rank computes in a step: something that all ranks share, and noise of its own."""
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        same = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + i))
        own = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + 100 * (rank + 1) + i))
        found[name] = (same + own) * 10.0 ** (i - 2)
    return found


def tail_of(rank: int, step: int) -> Tensor:
    """Statistics as the reducer writes them: own columns, and small counts in all of them."""
    tail = torch.zeros(TAIL)
    tail[5 * rank : 5 * rank + 5] = torch.randn(5, generator=torch.Generator().manual_seed(step + 10 * rank)) * 1e6
    tail[30:] = float(rank + 1)
    return tail


def arranged(group: Group, exchange: CompressedSum, buckets: Buckets) -> CompressedSum:
    exchange.arrange(buckets.layout)
    return exchange
