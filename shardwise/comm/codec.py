"""Codecs: a flat float32 tensor as fewer bytes, and back; what crosses a link that is too slow for all of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

ALIGN = 16  # bytes: payloads laid behind each other can all be viewed as any dtype
TINY = 2.0**-126  # the smallest scale whose inverse is finite
CHUNK = 1 << 18  # values encoded at once, so that what comes between stays in the cache


class Codec(Protocol):
    """Flat float32 <-> uint8. `values`, `out` and `payload` are 1-D and contiguous, on one device.

    A payload begins at a multiple of 16 bytes. What is not finite decodes to something not finite; zero to zero.
    """

    def payload_bytes(self, numel: int) -> int:
        """The length of the payload of `numel` values, whatever they are: a multiple of 16."""

    def encode(self, values: Tensor, out: Tensor) -> None:
        """Fill `out` (uint8 [payload_bytes(values.numel())])."""

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Overwrite `out` (float32 [numel]) with what `payload` says: the same bits on every machine."""


class Cast:
    """Every value rounded to the nearest of a shorter floating-point type; float32 itself loses nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def payload_bytes(self, numel: int) -> int:
        return aligned(numel * self._dtype.itemsize)

    def encode(self, values: Tensor, out: Tensor) -> None:
        cast = out.view(self._dtype)
        cast[: values.numel()].copy_(values)
        cast[values.numel() :].zero_()

    def decode(self, payload: Tensor, out: Tensor) -> None:
        out.copy_(payload.view(self._dtype)[: out.numel()])


class Blockwise:
    """Integers of 8 or 4 bits and one bfloat16 scale for each `block` values, so that the largest magnitude of a block
    has the largest integer (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", section 2.1).

    A value is off by at most half a scale. Magnitudes below 2**-127 become zero; a block that holds an infinity or a
    NaN decodes to nothing finite.
    """

    def __init__(self, bits: int, block: int) -> None:
        assert bits in (4, 8), bits
        assert block % 32 == 0, block
        self._bits = bits
        self._block = block
        self._top = 2 ** (bits - 1) - 1

    def payload_bytes(self, numel: int) -> int:
        blocks = -(-numel // self._block)
        return blocks * self._block * self._bits // 8 + aligned(2 * blocks)

    def encode(self, values: Tensor, out: Tensor) -> None:
        codes, scales = self._sections(values.numel(), out)
        whole = values.numel() // self._block
        rows, rest = values[: whole * self._block].view(-1, self._block), values[whole * self._block :]
        for at in range(0, whole, step := CHUNK // self._block):
            end = min(whole, at + step)
            self._encode(rows[at:end], codes[at:end], scales[at:end])
        if rest.numel():
            padded = values.new_zeros(1, self._block)
            padded[0, : rest.numel()] = rest
            self._encode(padded, codes[whole:], scales[whole:])

    def decode(self, payload: Tensor, out: Tensor) -> None:
        codes, scales = self._sections(out.numel(), payload)
        whole = out.numel() // self._block
        rows, rest = out[: whole * self._block].view(-1, self._block), out[whole * self._block :]
        self._decode(codes[:whole], scales[:whole], rows)
        if rest.numel():
            padded = out.new_empty(1, self._block)
            self._decode(codes[whole:], scales[whole:], padded)
            rest.copy_(padded[0, : rest.numel()])

    def _sections(self, numel: int, payload: Tensor) -> tuple[Tensor, Tensor]:
        """int8 [blocks, bytes of a block] and bfloat16 [blocks, 1] inside the payload."""
        blocks = -(-numel // self._block)
        cut = blocks * self._block * self._bits // 8
        codes = payload[:cut].view(torch.int8).view(blocks, self._block * self._bits // 8)
        return codes, payload[cut:].view(torch.bfloat16)[:blocks].view(blocks, 1)

    def _encode(self, rows: Tensor, codes: Tensor, scales: Tensor) -> None:
        largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
        scales.copy_(largest.div_(self._top).clamp_(min=TINY))
        steps = torch.mul(rows, scales.float().reciprocal_()).round_()
        if self._bits == 8:
            codes.copy_(steps)
            return
        # The two halves of a block share its bytes: both are read and written in runs.
        low, high = (half.to(torch.int8) for half in steps.chunk(2, dim=1))
        torch.bitwise_or(low.bitwise_and_(15), high.bitwise_left_shift_(4), out=codes)

    def _decode(self, codes: Tensor, scales: Tensor, rows: Tensor) -> None:
        if self._bits == 8:
            torch.mul(codes, scales.float(), out=rows)
            return
        low, high = rows.chunk(2, dim=1)
        torch.mul((codes << 4).bitwise_right_shift_(4), scales.float(), out=low)
        torch.mul(codes >> 4, scales.float(), out=high)


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of 16."""
    return -(-nbytes // ALIGN) * ALIGN
