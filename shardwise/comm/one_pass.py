"""`OnePass`: what replicas tell each other, and how they follow it, in one pass over memory each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.codec import Blockwise, Codec
from shardwise.comm.kernel import kernel


class OnePass:
    """The compiled kernel's arithmetic for parameters that lie apart, coded by `codec` as if they followed each other.

    `meeting` and `velocity` are float32, as long as all of them; see `parallel.fragments` for what is computed.
    """

    def __init__(self, codec: Blockwise, parameters: Sequence[Tensor]) -> None:
        self._codec = codec
        self._parameters = parameters
        self._numel = sum(p.numel() for p in parameters)
        self._sizes = (ctypes.c_uint64 * len(parameters))(*[p.numel() for p in parameters])
        self._scales_at = -(-self._numel // codec.block) * codec.block * codec.bits // 8

    def tell(self, meeting: Tensor, payload: Tensor) -> None:
        """Fill `payload` (uint8) with how far the parameters are from `meeting`."""
        codec, at = self._codec, payload.data_ptr()
        how = self._numel, codec.block, codec.bits, codec.weight, codec.divisor
        kernel().replica_tell(self._parts(), self._sizes, meeting.data_ptr(), at, at + self._scales_at, *how)

    def follow(
        self, meeting: Tensor, velocity: Tensor | None, received: Tensor, rank: int, *, rate: float, momentum: float
    ) -> None:
        """`received` (uint8 [ranks, bytes of a payload]) has what all replicas told, `rank` what this one did."""
        ranks, payload = received.shape
        outer = meeting.data_ptr(), velocity.data_ptr() if velocity is not None else None
        what = received.data_ptr(), payload, self._scales_at, rank, ranks
        how = self._numel, self._codec.block, self._codec.bits, rate, momentum
        kernel().replica_follow(self._parts(), self._sizes, *outer, *what, *how)

    def _parts(self) -> Any:
        """Where the parameters lie now."""
        return (ctypes.c_void_p * len(self._parameters))(*[p.data_ptr() for p in self._parameters])


def one_pass(codec: Codec | None, parameters: Sequence[Tensor]) -> OnePass | None:
    """None where torch has to do: another codec, no compiled kernel, or parameters that it does not take."""
    taken = all(p.is_cpu and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    if not taken or not isinstance(codec, Blockwise) or not all(codec.compiled_for(p) for p in parameters):
        return None
    return OnePass(codec, parameters)
