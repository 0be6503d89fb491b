"""Activations that wait for backward in host memory or on disk (what autograd saves, block after block).

    forward:   what is saved is copied and written behind        backward:  it is read ahead, in the opposite order

Parameters and buffers stay where they are, and so does what is small. What autograd saves twice leaves once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from shardwise.parallel.spill import Buffer, Place, Spill, padding
from shardwise.spec.plan import Plan

SMALLEST = 64 * 1024  # bytes: less is not worth the way
SMALL_SHARE = 8  # a view of less than an eighth of its storage leaves by itself
MOST_WRITING = 64 << 20  # bytes that may be on their way out at once
NEAR = 64  # how far back to look for what is read ahead
ROUND = 1 << 20  # places on disk are multiples of this, so that they are used again


class _Away:
    """One storage that has left. Views of it come back as views of one tensor."""

    def __init__(self, owner: Offloaded, storage: Tensor) -> None:
        self.owner, self.number = owner, owner.next_number()
        self.device = storage.device
        self.count = storage.numel()
        self.host: Tensor | None = None
        self.place: Place | None = None
        self.writing: Future[None] | None = None
        self.reading: Future[Buffer] | None = None
        self._back: Tensor | None = None

    def bytes(self) -> Tensor:
        """Its bytes on its device again, until autograd has done with all that is in them."""
        if self._back is None:
            self._back = self.owner.fetch(self)
        return self._back

    def __del__(self) -> None:
        self.owner.forget(self)


class _Saved:
    """What autograd holds instead of a tensor."""

    def __init__(self, away: _Away, like: Tensor) -> None:
        self.away, self.dtype = away, like.dtype
        self.size, self.stride, self.offset = like.size(), like.stride(), like.storage_offset()

    def tensor(self) -> Tensor:
        return self.away.bytes().view(self.dtype).as_strided(self.size, self.stride, self.offset)


class _Here(NamedTuple):
    """What stays, and how often it had been written to."""

    tensor: Tensor
    version: int


class Offloaded:
    """Where the activations of one module go. `around` is for its forward passes; backward finds them by itself."""

    def __init__(
        self,
        module: nn.Module,
        where: str,
        device: torch.device,
        folder: str | Path | None,
        gathered: Sequence[Tensor] = (),
    ) -> None:
        self._module, self._device, self._gathered = module, device, gathered
        self._spill = Spill(folder) if where == "disk" else None
        self._free: dict[int, list[tuple[Place, Future[None]]]] = {}  # and who may still be writing there
        self._known: dict[int, tuple[StorageWeakRef, int, weakref.ref[_Away]]] = {}  # by storage
        self._gone: dict[int, weakref.ref[_Away]] = {}  # what has left, by its number
        self._number = 0
        self._writing: list[tuple[int, Future[None]]] = []

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """In this block what autograd saves leaves."""
        fixed = {t.untyped_storage()._cdata for t in self._staying()}

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata in fixed or storage.nbytes() < SMALLEST or not _plain(tensor, self._device):
                return _Here(tensor, tensor._version)
            if SMALL_SHARE * tensor.nbytes < storage.nbytes():  # the rest would go with it
                tensor = tensor.clone()
                if tensor.nbytes < SMALLEST:
                    return _Here(tensor, tensor._version)
            return _Saved(self._away(tensor), tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
        self._known.clear()

    def _staying(self) -> Iterator[Tensor]:
        """Parameters, also those that are whole only while they compute, and buffers."""
        yield from (p.data for p in (*self._module.parameters(), *self._gathered))
        yield from self._module.buffers()

    def _away(self, tensor: Tensor) -> _Away:
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and not known[0].expired() and known[1] == tensor._version and (old := known[2]()):
            return old
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        away = _Away(self, raw)
        self._send(away, raw)
        self._known[storage._cdata] = (StorageWeakRef(storage), tensor._version, weakref.ref(away))
        self._gone[away.number] = weakref.ref(away)
        return away

    def _send(self, away: _Away, raw: Tensor) -> None:
        if self._spill is None:
            away.host = torch.empty(raw.shape, dtype=raw.dtype, pin_memory=True)
            away.host.copy_(raw)
            return
        spill = self._spill
        while self._writing and sum(size for size, _ in self._writing) + away.count > MOST_WRITING:
            spill.wait(self._writing.pop(0)[1])
        size = -(-away.count // ROUND) * ROUND
        places = self._free.get(size)
        if places:
            away.place, last = places.pop()
            spill.wait(last)
        else:
            away.place = spill.reserve(size)
        buffer = spill.buffer(torch.uint8, padding(away.count))
        buffer.data[: away.count].copy_(raw)

        def write(place: Place = away.place) -> None:
            spill.write(place, 0, buffer)
            spill.recycle(buffer)

        away.writing = spill.later(write)
        self._writing.append((away.count, away.writing))

    def next_number(self) -> int:
        """Storages are numbered as they leave."""
        self._number += 1
        return self._number

    def fetch(self, away: _Away) -> Tensor:
        """The bytes of what has left; what left before it is read ahead."""
        if self._spill is None:
            assert away.host is not None
            return away.host.to(away.device, non_blocking=True)
        reading = away.reading or self._read(away)
        away.reading = None
        before = self._before(away)
        if before is not None and before.reading is None:
            before.reading = self._read(before)
        buffer = self._spill.wait(reading)
        found = buffer.data[: away.count].clone().to(away.device)
        self._spill.recycle(buffer)
        return found

    def _before(self, away: _Away) -> _Away | None:
        """What left before it and is still waited for."""
        numbers = (number for number in range(away.number - 1, away.number - 1 - NEAR, -1) if number in self._gone)
        return next((found for number in numbers if (found := self._gone[number]())), None)

    def _read(self, away: _Away) -> Future[Buffer]:
        assert self._spill is not None
        assert away.place is not None
        assert away.writing is not None
        self._spill.wait(away.writing)
        return self._spill.later(self._spill.read, away.place, 0, torch.uint8, padding(away.count))

    def forget(self, away: _Away) -> None:
        """Nobody will ask for it any more: its place is free."""
        self._gone.pop(away.number, None)
        if away.place is not None and away.writing is not None:
            self._free.setdefault(away.place.size, []).append((away.place, away.writing))

    def close(self) -> None:
        """Give the disk its room back."""
        if self._spill is not None:
            self._spill.close()


def offloaded(
    module: nn.Module, plan: Plan, device: torch.device, folder: str | Path | None, gathered: Sequence[Tensor]
) -> Offloaded | None:
    """What the plan asks for; `folder` is where a file may lie, `gathered` what parameters are while they compute."""
    where = plan.offload.activations
    return Offloaded(module, where, device, folder, gathered) if where != "none" else None


def _unpack(saved: _Here | _Saved) -> Tensor:
    if isinstance(saved, _Saved):
        return saved.tensor()
    if saved.tensor._version != saved.version:  # torch does not look where hooks save
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {list(saved.tensor.shape)} is at version {saved.tensor._version}; backward needs it at version "
            f"{saved.version}"
        )
    return saved.tensor


def _plain(tensor: Tensor, device: torch.device) -> bool:
    """A dense tensor of the device, and no subclass with more to it."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device != device:
        return False
    return not tensor.is_conj() and not tensor.is_neg()
