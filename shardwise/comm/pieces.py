"""`PieceSum`: every rank gets the sum of one piece of a flat tensor; what the others add to it comes encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwise.comm.codec import Codec, aligned
from shardwise.comm.exchange import Pending


class AllToAll(Protocol):
    """`Group.all_to_all_single`, or torch's with another group in it."""

    def __call__(self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int], /) -> Pending: ...


class PieceSum:
    """The first half of an all-reduce, over encoded values: rank r's piece is values `bounds[r]`.

    A rank's own share of its own piece is not encoded, so it adds no error. `tail` further bytes go to every rank as
    they are. One sum is under way at a time: the buffers are kept.
    """

    def __init__(
        self, codec: Codec, bounds: Sequence[tuple[int, int]], rank: int, device: torch.device, *, tail: int = 0
    ) -> None:
        self._codec = codec
        self._rank = rank
        self._tail = tail
        self._others = [r for r in range(len(bounds)) if r != rank]
        self.bounds = list(bounds)
        mine = self._message_bytes(rank)
        self._to = [0 if r == rank else self._message_bytes(r) for r in range(len(bounds))]
        self._from = [0 if r == rank else mine for r in range(len(bounds))]
        self._sent = torch.zeros(sum(self._to), dtype=torch.uint8, device=device)
        self._arrived = torch.empty(sum(self._from), dtype=torch.uint8, device=device)

    def _payload(self, rank: int) -> int:
        first, stop = self.bounds[rank]
        return self._codec.payload_bytes(stop - first)

    def _message_bytes(self, rank: int) -> int:
        return self._payload(rank) + aligned(self._tail)

    def start(self, values: Tensor, all_to_all: AllToAll, tails: Sequence[Tensor]) -> Pending:
        """Encode `values` (float32 [numel]) piece by piece and send them, with rank r's one of `tails` (uint8)."""
        for rank, message in zip(self._others, self._outgoing(), strict=True):
            first, stop = self.bounds[rank]
            payload = self._payload(rank)
            self._codec.encode(values[first:stop], message[:payload])
            message[payload : payload + self._tail].copy_(tails[rank])
        return all_to_all(self._arrived, self._sent, self._from, self._to)

    def sent(self, values: Tensor, out: Tensor) -> None:
        """Fill `out` (float32 [numel]) with what of `values` takes part in the sums: all of this rank's own piece."""
        own = slice(*self.bounds[self._rank])
        out[own].copy_(values[own])
        for rank, message in zip(self._others, self._outgoing(), strict=True):
            first, stop = self.bounds[rank]
            self._codec.decode(message[: self._payload(rank)], out[first:stop])

    def finish(self, own: Tensor) -> Tensor:
        """The sum of this rank's piece in rank order, float32; `own` is this rank's share of it."""
        total = torch.zeros_like(own)
        share = torch.empty_like(own)
        arrived = iter(self._arrived.view(len(self._others), -1))
        for rank in range(len(self.bounds)):
            if rank == self._rank:
                total.add_(own)
            else:
                self._codec.decode(next(arrived)[: self._payload(self._rank)], share)
                total.add_(share)
        return total

    def sum_of_tails(self, own: Tensor) -> None:
        """`own`, this rank's own tail as numbers, becomes the sum of the tails of all ranks, in rank order."""
        first = self._payload(self._rank)
        arrived = iter(self._arrived.view(len(self._others), -1)[:, first : first + self._tail])
        mine = own.clone()
        own.zero_()
        for rank in range(len(self.bounds)):
            own.add_(mine if rank == self._rank else next(arrived).view(own.dtype))

    def _outgoing(self) -> Sequence[Tensor]:
        return self._sent.split([self._to[r] for r in self._others])


def even_pieces(numel: int, ranks: int, unit: int) -> list[tuple[int, int]]:
    """One piece a rank, multiples of `unit` elements but for the last ones, which may be shorter or empty."""
    length = -(-numel // (ranks * unit)) * unit
    return [(min(r * length, numel), min((r + 1) * length, numel)) for r in range(ranks)]


def settle(residual: Tensor, gradients: Tensor, sent: Callable[[Tensor], None]) -> Tensor:
    """`residual` already has `gradients` added to it: take off what is sent, which `sent` writes over a float32 tensor.

    Returns that tensor, which is `gradients` itself where it can be. Where something is not finite, the residual stays
    as it was before `gradients`: the step will not count.
    """
    finite = torch.isfinite(residual.sum())
    spoilt = residual.device.type != "cpu" or not finite  # another device is not asked: that would wait for it
    before = (residual - gradients).nan_to_num_(0.0, 0.0, 0.0) if spoilt else None
    out = gradients if gradients.dtype == torch.float32 else torch.empty_like(gradients, dtype=torch.float32)
    sent(out)
    residual.sub_(out)
    if before is not None:
        torch.where(finite, residual, before, out=residual)
    return out
