"""`Coded`: buckets that cross the wire through a codec.

Two ranks swap what they encoded. More ranks sum in two halves, so that a rank sends each value about twice whatever
their number: every rank sums one piece of what all ranks encoded, encodes the sum and hands it round.

Short vectors (biases, the weights of norms) and the tail go along as they are: vectors are few bytes, and beside a
matrix with gradients a thousand times as large an encoding would leave nothing of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shardwise.comm.codec import Codec, aligned
from shardwise.comm.exchange import Bucketed, Pending
from shardwise.comm.group import Group
from shardwise.comm.pieces import PieceSum, even_pieces, settle
from shardwise.comm.residuals import wide

UNIT = 1024  # pieces begin at multiples of it: of the blocks of codecs, and of cache lines
SHORT = 1 << 16  # elements of a vector that is sent as it is


class Coded:
    """A `Method` over a codec. Ranks decode the same bytes and add in rank order: they get the same bits."""

    def __init__(self, group: Group, codec: Codec) -> None:
        self._group = group
        self._codec = codec
        self._gaps: list[list[slice]] = []
        self._vectors: list[list[slice]] = []
        self._ways: dict[int, _Way] = {}
        self._underway: list[_Underway] = []

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        self._gaps = [gaps(bucket) for bucket in buckets]
        self._vectors = [vectors(bucket) for bucket in buckets]
        self._ways = {}
        self._underway = []

    def begin(self, number: int, residual: Tensor | None, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        if number == 0:
            self._underway = []
        exact = _taken_out(body, residual, tail, self._vectors[number])
        if number not in self._ways:
            kind = _Swap if self._group.size() == 2 else _Halves
            self._ways[number] = kind(self._group, self._codec, body.numel(), exact)
        way = self._ways[number]
        values = (body if residual is None else residual.add_(body)).float()
        way.send(values, exact)
        if residual is not None:
            total = settle(residual, body, lambda out: way.sent(values, out))
        else:
            total = body if body.dtype == torch.float32 else torch.empty_like(values)
            way.sent(values, total)
        self._underway.append(_Underway(way, residual, total, exact))
        return _Pending(self, number, self._underway[-1], body, tail, mean=mean)

    def second_halves(self) -> None:
        """All that was begun goes on, in the order of the buckets: the same on every rank."""
        begun, self._underway = self._underway, []
        for way, residual, total, _ in begun:
            way.second_half(total, residual)

    def finish(self, number: int, one: _Underway, body: Tensor, tail: Tensor, *, mean: bool) -> None:
        """Wait for a bucket; `body` and `tail` become the sums, or the means."""
        one.way.finish(one.total, one.exact)
        if mean:
            one.total.div_(self._group.size())
            one.exact.div_(self._group.size())
        if one.total is not body:
            body.copy_(one.total)
        for gap in self._gaps[number]:  # a block with a NaN decodes to NaN everywhere, and nobody else writes here
            body[gap].zero_()
        lengths = [part.stop - part.start for part in self._vectors[number]]
        exact_tail, *parts = one.exact.split([tail.numel(), *lengths])
        tail.copy_(exact_tail)
        for part, values in zip(self._vectors[number], parts, strict=True):
            body[part].copy_(values)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        return None


class _Way(Protocol):
    """The messages of one bucket."""

    def send(self, values: Tensor, exact: Tensor) -> None:
        """Encode `values` (float32 [numel]) and begin."""

    def sent(self, values: Tensor, out: Tensor) -> None:
        """Fill `out` with what of `values` takes part in the sum."""

    def second_half(self, shares: Tensor, residual: Tensor | None) -> None:
        """Go on once the first message has arrived; `shares` is what `sent` filled."""

    def finish(self, total: Tensor, exact: Tensor) -> None:
        """Wait; `total` (as `sent` filled it) becomes the sum, and so does `exact`."""


class _Underway(NamedTuple):
    """One bucket on its way: `total` is this rank's share of the sum, then the sum; `exact` is summed as it is."""

    way: _Way
    residual: Tensor | None
    total: Tensor
    exact: Tensor


class _Pending:
    """What the reducer waits for."""

    def __init__(self, owner: Coded, number: int, one: _Underway, body: Tensor, tail: Tensor, *, mean: bool) -> None:
        self._owner = owner
        self._number = number
        self._one = one
        self._body = body
        self._tail = tail
        self._mean = mean

    def wait(self) -> None:
        self._owner.second_halves()
        self._owner.finish(self._number, self._one, self._body, self._tail, mean=self._mean)


class _Swap:
    """Two ranks: each sends all of its values, encoded, and adds what comes."""

    def __init__(self, group: Group, codec: Codec, numel: int, exact: Tensor) -> None:
        self._group = group
        self._codec = codec
        self._payload = codec.payload_bytes(numel)
        self._message = torch.zeros(self._payload + aligned(exact.nbytes), dtype=torch.uint8, device=exact.device)
        self._arrived = self._message.new_empty(2, self._message.numel())
        self._work: Pending | None = None

    def send(self, values: Tensor, exact: Tensor) -> None:
        self._codec.encode(values, self._message[: self._payload])
        self._message[self._payload : self._payload + exact.nbytes].copy_(exact.view(torch.uint8))
        self._work = self._group.all_gather_single(self._arrived.view(-1), self._message)

    def sent(self, values: Tensor, out: Tensor) -> None:
        self._codec.decode(self._message[: self._payload], out)

    def second_half(self, shares: Tensor, residual: Tensor | None) -> None:
        return None

    def finish(self, total: Tensor, exact: Tensor) -> None:
        assert self._work is not None
        self._work.wait()
        other = self._arrived[1 - self._group.rank()]
        share = torch.empty_like(total)
        self._codec.decode(other[: self._payload], share)
        total.add_(share)
        exact.add_(other[self._payload : self._payload + exact.nbytes].view(exact.dtype))


class _Halves:
    """More ranks: each sums one piece of all values, encodes the sum, and gathers the others' sums."""

    def __init__(self, group: Group, codec: Codec, numel: int, exact: Tensor) -> None:
        self._group = group
        self._codec = codec
        ranks, rank = group.size(), group.rank()
        self._pieces = PieceSum(codec, even_pieces(numel, ranks, UNIT), rank, exact.device, tail=exact.nbytes)
        self._own = slice(*self._pieces.bounds[rank])
        longest = self._pieces.bounds[0][1]
        self._message = torch.zeros(codec.payload_bytes(longest), dtype=torch.uint8, device=exact.device)
        self._arrived = self._message.new_empty(ranks, self._message.numel())
        self._work: Pending | None = None

    def send(self, values: Tensor, exact: Tensor) -> None:
        self._work = self._pieces.start(
            values, self._group.all_to_all_single, [exact.view(torch.uint8)] * self._group.size()
        )

    def sent(self, values: Tensor, out: Tensor) -> None:
        self._pieces.sent(values, out)

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

    def finish(self, total: Tensor, exact: Tensor) -> None:
        assert self._work is not None
        self._work.wait()
        for (first, stop), arrived in zip(self._pieces.bounds, self._arrived, strict=True):
            self._codec.decode(arrived[: self._codec.payload_bytes(stop - first)], total[first:stop])
        self._pieces.sum_of_tails(exact)


def gaps(bucket: Bucketed) -> list[slice]:
    """Where a bucket's body belongs to no parameter."""
    found, at = [], 0
    for piece in sorted(bucket.pieces, key=lambda piece: piece.offset):
        found.append(slice(at, piece.offset))
        at = piece.offset + math.prod(piece.shape)
    return [gap for gap in [*found, slice(at, bucket.numel)] if gap.stop > gap.start]


def is_short(shape: Sequence[int]) -> bool:
    """Whether a parameter is a vector that is sent as it is."""
    return len(shape) < 2 and math.prod(shape) <= SHORT


def vectors(bucket: Bucketed) -> list[slice]:
    """Where a bucket has short vectors."""
    return [slice(p.offset, p.offset + math.prod(p.shape)) for p in bucket.pieces if is_short(p.shape)]


def _taken_out(body: Tensor, residual: Tensor | None, tail: Tensor, parts: Sequence[slice]) -> Tensor:
    """The tail and the values at `parts` with their residuals, which are zeros there from now on."""
    found = [tail.to(wide(body.dtype))]
    for part in parts:
        found.append(body[part].to(wide(body.dtype), copy=True))
        body[part].zero_()
        if residual is not None:
            found[-1].add_(residual[part])
            residual[part].zero_()
    return torch.cat(found)
