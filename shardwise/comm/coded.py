"""`Coded`: buckets that cross the wire through a codec.

Two ranks swap what they encoded. More ranks sum in two halves, so that a rank sends each value about twice whatever
their number: every rank sums one piece of what all ranks encoded, encodes the sum and hands it round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwise.comm.codec import Codec, aligned
from shardwise.comm.exchange import Bucketed, Pending
from shardwise.comm.group import Group
from shardwise.comm.pieces import PieceSum, even_pieces

UNIT = 1024  # pieces begin at multiples of it: of the blocks of codecs, and of cache lines


class Coded:
    """A `Method` over a codec. Ranks decode the same bytes and add in rank order: they get the same bits."""

    def __init__(self, group: Group, codec: Codec) -> None:
        self._group = group
        self._codec = codec
        self._gaps: list[list[slice]] = []
        self._ways: dict[int, _Way] = {}
        self._underway: list[_Underway] = []

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        self._gaps = [gaps(bucket) for bucket in buckets]
        self._ways = {}
        self._underway = []

    def begin(self, number: int, residual: Tensor | None, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        if number == 0:
            self._underway = []
        way = self._way(number, body, tail)
        values = (body if residual is None else residual.add_(body)).float()
        way.send(values, tail)
        total = body if body.dtype == torch.float32 else torch.empty_like(values)
        if residual is None:
            way.sent(values, total)
        else:
            finite = torch.isfinite(residual.sum())
            spoilt = residual.device.type != "cpu" or not finite  # another device is not asked: that would wait for it
            before = (residual - body).nan_to_num_(0.0, 0.0, 0.0) if spoilt else None
            way.sent(values, total)
            residual.sub_(total)
            if before is not None:
                torch.where(finite, residual, before, out=residual)
        one = _Underway(self, way, residual, total, body, tail, self._gaps[number], mean=mean)
        self._underway.append(one)
        return one

    def second_halves(self) -> None:
        """All that was begun goes on, in the order of the buckets: the same on every rank."""
        begun, self._underway = self._underway, []
        for one in begun:
            one.second_half()

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return self._group.size()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        return None

    def _way(self, number: int, body: Tensor, tail: Tensor) -> _Way:
        if number not in self._ways:
            kind = _Swap if self._group.size() == 2 else _Halves
            self._ways[number] = kind(self._group, self._codec, body, tail)
        return self._ways[number]


class _Way(Protocol):
    """The messages of one bucket."""

    def send(self, values: Tensor, tail: Tensor) -> None:
        """Encode `values` (float32 [numel]) and begin."""

    def sent(self, values: Tensor, out: Tensor) -> None:
        """Fill `out` with what of `values` takes part in the sum."""

    def second_half(self, shares: Tensor, residual: Tensor | None) -> None:
        """Go on once the first message has arrived; `shares` is what `sent` filled."""

    def finish(self, total: Tensor, tail: Tensor) -> None:
        """Wait; `total` (as `sent` filled it) becomes the sum, and so does `tail`."""


class _Underway:
    """One bucket on its way."""

    def __init__(
        self,
        owner: Coded,
        way: _Way,
        residual: Tensor | None,
        total: Tensor,
        body: Tensor,
        tail: Tensor,
        gaps: Sequence[slice],
        *,
        mean: bool,
    ) -> None:
        self._owner = owner
        self._way = way
        self._residual = residual
        self._total = total
        self._body = body
        self._tail = tail
        self._gaps = gaps
        self._mean = mean

    def second_half(self) -> None:
        self._way.second_half(self._total, self._residual)

    def wait(self) -> None:
        self._owner.second_halves()
        self._way.finish(self._total, self._tail)
        if self._mean:
            self._total.div_(self._owner.ranks)
            self._tail.div_(self._owner.ranks)
        if self._total is not self._body:
            self._body.copy_(self._total)
        for gap in self._gaps:  # a block with a NaN in it decodes to NaN everywhere, and nobody else writes here
            self._body[gap].zero_()


class _Swap:
    """Two ranks: each sends all of its values, encoded, and adds what comes."""

    def __init__(self, group: Group, codec: Codec, body: Tensor, tail: Tensor) -> None:
        self._group = group
        self._codec = codec
        self._payload = codec.payload_bytes(body.numel())
        self._message = torch.zeros(self._payload + aligned(tail.nbytes), dtype=torch.uint8, device=body.device)
        self._arrived = self._message.new_empty(2, self._message.numel())
        self._work: Pending | None = None

    def send(self, values: Tensor, tail: Tensor) -> None:
        self._codec.encode(values, self._message[: self._payload])
        self._message[self._payload : self._payload + tail.nbytes].copy_(tail.view(torch.uint8))
        self._work = self._group.all_gather_single(self._arrived.view(-1), self._message)

    def sent(self, values: Tensor, out: Tensor) -> None:
        self._codec.decode(self._message[: self._payload], out)

    def second_half(self, shares: Tensor, residual: Tensor | None) -> None:
        return None

    def finish(self, total: Tensor, tail: Tensor) -> None:
        assert self._work is not None
        self._work.wait()
        other = self._arrived[1 - self._group.rank()]
        share = torch.empty_like(total)
        self._codec.decode(other[: self._payload], share)
        total.add_(share)
        tail.add_(other[self._payload : self._payload + tail.nbytes].view(tail.dtype))


class _Halves:
    """More ranks: each sums one piece of all values, encodes the sum, and gathers the others' sums."""

    def __init__(self, group: Group, codec: Codec, body: Tensor, tail: Tensor) -> None:
        self._group = group
        self._codec = codec
        ranks, rank = group.size(), group.rank()
        self._pieces = PieceSum(codec, even_pieces(body.numel(), ranks, UNIT), rank, body.device, tail=tail.nbytes)
        self._own = slice(*self._pieces.bounds[rank])
        longest = self._pieces.bounds[0][1]
        self._message = torch.zeros(codec.payload_bytes(longest), dtype=torch.uint8, device=body.device)
        self._arrived = self._message.new_empty(ranks, self._message.numel())
        self._work: Pending | None = None

    def send(self, values: Tensor, tail: Tensor) -> None:
        self._work = self._pieces.start(values, self._group.all_to_all_single, tail.view(torch.uint8))

    def sent(self, values: Tensor, out: Tensor) -> None:
        out[self._own].copy_(values[self._own])
        self._pieces.sent(out)

    def second_half(self, shares: Tensor, residual: Tensor | None) -> None:
        assert self._work is not None
        self._work.wait()
        total = self._pieces.finish(shares[self._own])
        payload = self._message[: self._codec.payload_bytes(total.numel())]
        self._codec.encode(total, payload)
        self._work = self._group.all_gather_single(self._arrived.view(-1), self._message)
        if residual is not None:  # of the sum, what the second encoding leaves out is this rank's to add again
            handed_round = torch.empty_like(total)
            self._codec.decode(payload, handed_round)
            residual[self._own].add_(total.sub_(handed_round).nan_to_num_(0.0, 0.0, 0.0))

    def finish(self, total: Tensor, tail: Tensor) -> None:
        assert self._work is not None
        self._work.wait()
        for (first, stop), arrived in zip(self._pieces.bounds, self._arrived, strict=True):
            self._codec.decode(arrived[: self._codec.payload_bytes(stop - first)], total[first:stop])
        rows = [row.view(tail.dtype) for row in self._pieces.tails(tail.clone().view(torch.uint8))]
        tail.zero_()
        for row in rows:
            tail.add_(row)


def gaps(bucket: Bucketed) -> list[slice]:
    """Where a bucket's body belongs to no parameter."""
    found, at = [], 0
    for piece in sorted(bucket.pieces, key=lambda piece: piece.offset):
        found.append(slice(at, piece.offset))
        at = piece.offset + math.prod(piece.shape)
    return [gap for gap in [*found, slice(at, bucket.numel)] if gap.stop > gap.start]
