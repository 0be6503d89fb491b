"""Codecs: a flat float32 tensor as fewer bytes, and back; what crosses a link that is too slow for all of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shardwise.comm.kernel import kernel, loadable

ALIGN = 16  # bytes: payloads laid behind each other can all be viewed as any dtype
TINY = 2.0**-126  # the smallest scale whose inverse is finite
TERNARY = 1.534  # times the mean magnitude: for a normal distribution 1.224 standard deviations
OUTLIER = 4.0  # scales are at least the largest magnitude / this: it is gone in a few payloads, whatever the others are
LONGEST = 1024  # the longest block
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
    """Integers of 8, 4 or 2 bits and one bfloat16 scale for each `block` values, so that the largest magnitude of a
    block has the largest integer (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", section 2.1).

    A value is off by at most half a scale. With 2 bits the integers are -1, 0 and 1, and larger magnitudes than the
    scale become the scale, where the squared error of normally distributed values is least (Max 1960, table I), but at
    least a quarter of the largest.
    Magnitudes below 2**-127 become zero; a block that holds an infinity or a NaN decodes to nothing finite.
    """

    def __init__(self, bits: int, block: int, *, compiled: bool = True) -> None:
        """`compiled=False`: by torch, also where there is the compiled kernel, which gives the same codes."""
        assert bits in (2, 4, 8), bits
        assert block % 64 == 0, block
        assert block <= LONGEST, block
        self.bits = bits
        self.block = block
        self.divisor = OUTLIER if bits == 2 else float(2 ** (bits - 1) - 1)
        self.weight = TERNARY / block if bits == 2 else 0.0
        self._compiled = compiled and loadable()

    def payload_bytes(self, numel: int) -> int:
        blocks = -(-numel // self.block)
        return blocks * self.block * self.bits // 8 + aligned(2 * blocks)

    def encode(self, values: Tensor, out: Tensor) -> None:
        codes, scales = self._sections(values.numel(), out)
        if self.compiled_for(values):
            where = values.data_ptr(), codes.data_ptr(), scales.data_ptr(), values.numel()
            kernel().codec_encode(*where, self.block, self.bits, self.weight, self.divisor)
            return
        whole = values.numel() // self.block
        rows, rest = values[: whole * self.block].view(-1, self.block), values[whole * self.block :]
        for at in range(0, whole, step := CHUNK // self.block):
            end = min(whole, at + step)
            self._encode(rows[at:end], codes[at:end], scales[at:end])
        if rest.numel():
            padded = values.new_zeros(1, self.block)
            padded[0, : rest.numel()] = rest
            self._encode(padded, codes[whole:], scales[whole:])

    def decode(self, payload: Tensor, out: Tensor) -> None:
        codes, scales = self._sections(out.numel(), payload)
        if self.compiled_for(out):
            where = codes.data_ptr(), scales.data_ptr(), out.data_ptr(), out.numel()
            kernel().codec_decode(*where, self.block, self.bits)
            return
        whole = out.numel() // self.block
        rows, rest = out[: whole * self.block].view(-1, self.block), out[whole * self.block :]
        self._decode(codes[:whole], scales[:whole], rows)
        if rest.numel():
            padded = out.new_empty(1, self.block)
            self._decode(codes[whole:], scales[whole:], padded)
            rest.copy_(padded[0, : rest.numel()])

    def _sections(self, numel: int, payload: Tensor) -> tuple[Tensor, Tensor]:
        """int8 [blocks, bytes of a block] and bfloat16 [blocks, 1] inside the payload."""
        blocks = -(-numel // self.block)
        cut = blocks * self.block * self.bits // 8
        codes = payload[:cut].view(torch.int8).view(blocks, self.block * self.bits // 8)
        return codes, payload[cut:].view(torch.bfloat16)[:blocks].view(blocks, 1)

    def _encode(self, rows: Tensor, codes: Tensor, scales: Tensor) -> None:
        scales.copy_(self._scale(rows).clamp_(min=TINY))
        steps = torch.mul(rows, scales.float().reciprocal_()).round_()
        if self.bits == 8:
            codes.copy_(steps)
            return
        if self.bits == 2:
            steps.clamp_(-1, 1)
        # The halves or quarters of a block share its bytes: all are read and written in runs.
        parts = steps.to(torch.int8).chunk(8 // self.bits, dim=1)
        torch.bitwise_left_shift(parts[-1], 8 - self.bits, out=codes)
        for place, part in enumerate(parts[:-1]):
            codes.bitwise_or_(part.bitwise_and_(2**self.bits - 1).bitwise_left_shift_(place * self.bits))

    def _scale(self, rows: Tensor) -> Tensor:
        """What the integer 1 stands for in each row, [rows, 1]."""
        largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_()).div_(self.divisor)
        if not self.weight:
            return largest
        mean = rows.abs() @ rows.new_full((self.block, 1), self.weight)  # finite, unlike a sum of all
        return torch.maximum(largest, mean)

    def compiled_for(self, values: Tensor) -> bool:
        """Whether the compiled kernel takes such a tensor."""
        return self._compiled and values.is_cpu

    def _decode(self, codes: Tensor, scales: Tensor, rows: Tensor) -> None:
        if self.bits == 8:
            torch.mul(codes, scales.float(), out=rows)
            return
        signed = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        for place, part in enumerate(signed.chunk(8 // self.bits, dim=1)):
            torch.bitwise_left_shift(codes, 8 - (place + 1) * self.bits, out=part)
        torch.mul(signed.bitwise_right_shift_(8 - self.bits), scales.float(), out=rows)


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of 16."""
    return -(-nbytes // ALIGN) * ALIGN
