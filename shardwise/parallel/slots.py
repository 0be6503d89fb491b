"""Where an array of numbers lies between two updates, and in which format: a `Slot` for each state of a parameter.

float32 | bfloat16 | int8 with scales     in the device's memory | in the host's | on disk
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shardwise.parallel.low_bit import BLOCK, dequantize, quantize, round_by_chance
from shardwise.parallel.spill import Buffer, Spill

Format = Literal["float32", "bfloat16", "int8"]
Where = Literal["none", "host", "disk"]
CODES, SCALES = "codes", "block_scales"  # an 8-bit state in a checkpoint
QUANTUM = 4096  # elements: pieces begin at multiples, which all formats can be cut at


class Array(ABC):
    """`count` numbers of one dtype. `fetch` and `put` may run on another thread."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.count, self.dtype = count, dtype

    @abstractmethod
    def fetch(self, start: int, stop: int) -> Any:
        """A piece, as `data` shows it."""

    @abstractmethod
    def data(self, piece: Any) -> Tensor:
        """What `fetch` found, flat on the device; in memory it is the array itself."""

    @abstractmethod
    def put(self, start: int, piece: Any, values: Tensor) -> Any:
        """`values` take the place of the piece; what this returns goes to `flush`."""

    def flush(self, start: int, piece: Any) -> None:
        """Bring a piece to where it lies."""
        return None

    @abstractmethod
    def whole(self) -> Tensor:
        """All of it, to read and to write."""


class InMemory(Array):
    """On `device`; of a plan that offloads to the host it lies there, pinned."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, *, host: bool) -> None:
        super().__init__(count, dtype)
        self._device = device
        place = torch.device("cpu") if host else device
        self._values = torch.zeros(count, dtype=dtype, device=place, pin_memory=host)

    def fetch(self, start: int, stop: int) -> Tensor:
        return self._values[start:stop].to(self._device, non_blocking=True)

    def data(self, piece: Tensor) -> Tensor:
        return piece

    def put(self, start: int, piece: Tensor, values: Tensor) -> None:
        here = self._values[start : start + values.numel()]
        if values.data_ptr() != here.data_ptr():
            here.copy_(values)

    def whole(self) -> Tensor:
        return self._values


class OnDisk(Array):
    """In a file; a piece of it is in memory while it is worked on."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, spill: Spill) -> None:
        super().__init__(count, dtype)
        self._device, self._spill = device, spill
        self._place = spill.reserve(count * dtype.itemsize)

    def fetch(self, start: int, stop: int) -> Buffer:
        return self._spill.read(self._place, start * self.dtype.itemsize, self.dtype, stop - start)

    def data(self, piece: Buffer) -> Tensor:
        return piece.data.to(self._device)

    def put(self, start: int, piece: Buffer | None, values: Tensor) -> Buffer:
        piece = piece or self._spill.buffer(self.dtype, values.numel())
        if values.data_ptr() != piece.data.data_ptr():
            piece.data.copy_(values)
        return piece

    def flush(self, start: int, piece: Buffer) -> None:
        self._spill.write(self._place, start * self.dtype.itemsize, piece)
        self._spill.recycle(piece)

    def whole(self) -> Tensor:
        return self._spill.mapped(self._place, self.dtype, self.count)


class Slot:
    """One state of a parameter, `count` elements of `dtype` when an optimizer sees them."""

    def __init__(self, kept: Format, dtype: torch.dtype, *, signed: bool, main: Array, scales: Array | None) -> None:
        self.kept, self.dtype, self.signed = kept, dtype, signed
        self.main, self._scales = main, scales

    def fetch(self, start: int, stop: int) -> Any:
        return self.main.fetch(start, stop)

    def load(self, start: int, stop: int, piece: Any) -> Tensor:
        """The piece that was fetched, as the optimizer wants it."""
        data = self.main.data(piece)
        if self._scales is not None:
            scales = self._scales.whole()[start // BLOCK : -(-stop // BLOCK)]
            return dequantize(data, scales, signed=self.signed).to(self.dtype)
        return data.to(self.dtype)

    def store(self, start: int, piece: Any, values: Tensor, generator: torch.Generator) -> Any:
        """Take over new values of a piece; what this returns goes to `flush`."""
        if self._scales is not None:
            values, scales = quantize(values, signed=self.signed)
            self._scales.whole()[start // BLOCK :][: len(scales)] = scales
        elif self.kept == "bfloat16":
            values = round_by_chance(values, generator)
        return self.main.put(start, piece, values)

    def flush(self, start: int, piece: Any) -> None:
        self.main.flush(start, piece)

    @property
    def in_blocks(self) -> bool:
        """Whether it has scales for blocks of this rank's elements."""
        return self._scales is not None

    @property
    def size(self) -> int:
        """Bytes of all of it as the optimizer sees it."""
        return self.main.count * self.dtype.itemsize

    def widen(self, into: Tensor) -> None:
        """Write all of it, as the optimizer sees it, into a flat tensor, a piece at a time."""
        main = self.main.whole()
        assert self._scales is not None
        for start in range(0, self.main.count, QUANTUM * BLOCK):
            part = main[start : start + QUANTUM * BLOCK]
            scales = self._scales.whole()[start // BLOCK :][: -(-len(part) // BLOCK)]
            into[start : start + len(part)] = dequantize(part, scales, signed=self.signed)

    def shown(self, like: Tensor) -> Any:
        """As a checkpoint has it: a tensor in the shape of the parameter, or a dict of two."""
        if self._scales is not None:
            return {CODES: shaped(self.main.whole(), like), SCALES: self._scales.whole()}
        return shaped(self.main.whole(), like)

    def take(self, value: Any, generator: torch.Generator) -> None:
        """Become what a checkpoint had, in whatever format it was, a piece at a time."""
        quantized = isinstance(value, dict)
        source = flat(value[CODES] if quantized else value)
        if quantized and self._scales is not None:
            self._scales.whole().copy_(value[SCALES])
        for start in range(0, self.main.count, QUANTUM * BLOCK):
            part = source[start : start + QUANTUM * BLOCK]
            if quantized and self._scales is None:
                scales = value[SCALES][start // BLOCK :][: -(-len(part) // BLOCK)]
                part = dequantize(part, scales, signed=self.signed).to(self.dtype)
            same = part.dtype == self.main.dtype  # then not one bit is rounded again
            self.flush(start, self.main.put(start, None, part) if same else self.store(start, None, part, generator))


class Slots(NamedTuple):
    """Makes slots of one format in one place."""

    kept: Format
    where: Where
    spill: Spill | None

    def make(self, count: int, dtype: torch.dtype, device: torch.device, *, signed: bool = True) -> Slot:
        kind = {"float32": dtype, "bfloat16": torch.bfloat16, "int8": torch.uint8}[self.kept]
        scales = None
        if self.kept == "int8":
            scales = InMemory(-(-count // BLOCK), torch.float32, device, host=False)
        return Slot(self.kept, dtype, signed=signed, main=self._array(count, kind, device), scales=scales)

    def _array(self, count: int, dtype: torch.dtype, device: torch.device) -> Array:
        if self.spill is not None and count:
            return OnDisk(count, dtype, device, self.spill)
        return InMemory(count, dtype, device, host=self.where == "host")


class Wide:
    """States as an optimizer sees them, for a checkpoint: in a file in `folder`, so that they take no memory."""

    def __init__(self, slots: Sequence[Slot], folder: str | Path | None) -> None:
        self._spill = Spill(folder) if slots else None
        self._places = {id(slot): self._spill.reserve(slot.size) for slot in slots if self._spill is not None}

    def shown(self, slot: Slot, like: Tensor) -> Any:
        """A tensor in the shape of the part of the parameter; what was not named before is shown as it is kept."""
        if self._spill is None or id(slot) not in self._places:
            return slot.shown(like)
        if not slot.main.count:  # of a rank whose part is empty
            return torch.empty(like.shape, dtype=slot.dtype)
        found = self._spill.mapped(self._places[id(slot)], slot.dtype, slot.main.count)
        slot.widen(found)
        return shaped(found, like)

    def close(self) -> None:
        """The disk has its room back."""
        if self._spill is not None:
            self._spill.close()


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """The inverse: flat values in the shape of a dense tensor that lies in memory as `like` does."""
    return values.as_strided(like.shape, like.stride())
