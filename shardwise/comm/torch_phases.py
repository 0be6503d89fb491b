"""`Phases`: collectives over a `Segment`, phase by phase, each a generator that yields while other ranks are behind.

In a phase a rank writes a chunk into a slot of its own, raises its counter, waits for the counters of those it needs,
and reads their slots: what shm_kernel.c does, in Python and torch, with the same bits.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.kernel import Kind
from shardwise.comm.shm import DTYPES, REDUCTIONS
from shardwise.comm.shm_work import ShmFailure
from shardwise.comm.torch_segment import CHUNK, LINE, Said, Segment
from shardwise.comm.torch_sums import BLOCK, fold

SMALL = 32 << 10  # bytes up to which every rank sums every chunk: sharing the work out takes another phase
ROOTED = (Kind.REDUCE, Kind.BROADCAST, Kind.GATHER, Kind.SCATTER)
SUMMING = (Kind.ALL_REDUCE, Kind.REDUCE, Kind.REDUCE_SCATTER)
TYPES = {code: dtype for dtype, code in DTYPES.items()}
NAMES = {code: operation.name for operation, code in REDUCTIONS.items()}
Steps = Generator[None, None, Any]


class Op:
    """One operation. `inputs` and `outputs` are contiguous and live until it has ended; one, or one for each rank."""

    def __init__(
        self,
        kind: Kind,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        nbytes: int,
        dtype: int = 0,
        reduction: int = 0,
        root: int = 0,
    ) -> None:
        self.kind, self.nbytes, self.dtype, self.reduction, self.root = kind, nbytes, dtype, reduction, root
        self.tensors = (inputs, outputs)
        self.ins = [(each.data_ptr(), each.nbytes) for each in inputs]
        self.outs = [(each.data_ptr(), each.nbytes) for each in outputs]
        self.peer, self.tag = -1, 0  # of a message
        self.done = False


def chunks(nbytes: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Offset and length of each chunk, at least one."""
    for at in range(0, max(1, nbytes), size):
        yield at, min(size, nbytes - at)


class Phases:
    """This rank's place in the order of phases that all ranks go through. `names[r]` is what errors call rank r."""

    def __init__(self, segment: Segment, names: Sequence[int], heaps: Sequence[tuple[int, int]]) -> None:
        self.segment = segment
        self.rank, self.size, self.others = segment.rank, segment.size, segment.others
        self._names = names
        self._heaps = heaps  # the address and length of each rank's
        self._phase = 0
        self._serial = 0
        self._rooted = False
        self._scratch = torch.empty(8 * BLOCK, dtype=torch.uint8, device="cpu")

    def steps(self, op: Op) -> Steps:
        """Run `op`. Raises ShmFailure where ranks call different things."""
        self._serial += 1
        if op.kind in (Kind.GATHER, Kind.SCATTER, Kind.ALL_GATHER, Kind.ALL_TO_ALL):
            self._keep_own(op)
        yield from getattr(self, op.kind.name.lower())(op)
        self._rooted = op.kind in ROOTED

    def _enter(self, op: Op, *, heap: int = -1, most: int = 0) -> Generator[None, None, int]:
        """Begin a phase; where this rank writes its chunk. The slot is free once all have arrived at the last phase."""
        segment, phase = self.segment, self._phase
        while not all(segment.count(r) >= phase for r in self.others):
            yield
        segment.in_order()
        if self._rooted:  # where only the root reads, or is read, ranks are compared when the next phase begins
            self._rooted = False
            for r in self.others:
                self._same_call(r, phase - 1)
        nbytes = op.ins[0][1] if op.kind is Kind.ALL_GATHER else op.nbytes
        segment.say(phase, Said(self._serial, nbytes, most, heap, op.kind, op.dtype, op.reduction, op.root))
        return segment.data(self.rank, phase)

    def _meet(self, op: Op, needed: Sequence[int]) -> Generator[None, None, int]:
        """Arrive, wait for those that this rank reads from, and compare what they called; the phase to read."""
        segment, phase = self.segment, self._phase
        segment.arrive(phase + 1)
        while not all(segment.count(r) > phase for r in needed):
            yield
        segment.in_order()
        for r in needed:
            self._same_call(r, phase, op.outs[r][1] if op.kind is Kind.ALL_GATHER else None)
        self._phase += 1
        return phase

    # What ranks called.

    def _same_call(self, rank: int, phase: int, expected: int | None = None) -> None:
        mine, theirs = self.segment.said(self.rank, phase), self.segment.said(rank, phase)
        if _compared(mine, mine.nbytes if expected is None else expected) != _compared(theirs, theirs.nbytes):
            raise ShmFailure(
                f"rank {self._names[self.rank]} called {_described(mine)} where rank {self._names[rank]} called "
                f"{_described(theirs)} (operation number {mine.serial} of this group)"
            )

    # Collectives, by the names of `Kind`.

    def barrier(self, op: Op) -> Steps:
        yield from self._enter(op)
        yield from self._meet(op, self.others)

    def all_reduce(self, op: Op) -> Steps:
        (source, nbytes), (target, _) = op.ins[0], op.outs[0]
        if nbytes <= SMALL:
            own = yield from self._enter(op)
            ctypes.memmove(own, source, nbytes)
            phase = yield from self._meet(op, self.others)
            self._fold(op, [target], [self.segment.data(r, phase) for r in range(self.size)], nbytes)
            return
        yield from self._enter(op, heap=self._in_heap(source) if source == target else -1)
        phase = yield from self._meet(op, self.others)
        heaps = [self.segment.said(r, phase).heap for r in range(self.size)]
        if min(heaps) >= 0:
            yield from self._enter(op)
            at, count = self._share(nbytes, self.rank)
            places = [start + heap + at for (start, _), heap in zip(self._heaps, heaps, strict=True)]
            self._fold(op, places, places, count)
            yield from self._meet(op, self.others)
        elif self.size <= 2:
            for at, count in chunks(nbytes):
                own = yield from self._enter(op)
                ctypes.memmove(own, source + at, count)
                phase = yield from self._meet(op, self.others)
                self._fold(op, [target + at], [self.segment.data(r, phase) for r in range(self.size)], count)
        else:
            yield from self._all_reduce_shared_out(op, source, target, nbytes)

    def _all_reduce_shared_out(self, op: Op, source: int, target: int, nbytes: int) -> Steps:
        """Each rank sums a share of every chunk, and the others copy it in the next phase, with the next chunk."""
        half = CHUNK // 2
        last_at = last = 0
        for chunk_at, chunk in [*chunks(nbytes, half), (nbytes, 0)]:
            own = yield from self._enter(op)
            ctypes.memmove(own, source + chunk_at, chunk)
            at, count = self._share(last, self.rank)
            slots = [self.segment.data(r, self._phase - 1) + at for r in range(self.size)]
            self._fold(op, [own + half], slots, count)
            phase = yield from self._meet(op, self.others)
            for r in range(self.size):
                at, count = self._share(last, r)
                ctypes.memmove(target + last_at + at, self.segment.data(r, phase) + half, count)
            last_at, last = chunk_at, chunk

    def reduce(self, op: Op) -> Steps:
        root = op.root == self.rank
        for at, count in chunks(op.nbytes):
            own = yield from self._enter(op)
            if not root:
                ctypes.memmove(own, op.ins[0][0] + at, count)
            phase = yield from self._meet(op, self.others if root else ())
            if root:
                self._fold(op, [op.outs[0][0] + at], self._slots(phase, op.ins[0][0] + at), count)

    def reduce_scatter(self, op: Op) -> Steps:
        piece = self._piece()
        for at, count in chunks(op.nbytes, piece):
            own = yield from self._enter(op)
            for r in self.others:
                ctypes.memmove(own + r * piece, op.ins[r][0] + at, count)
            phase = yield from self._meet(op, self.others)
            slots = self._slots(phase, op.ins[self.rank][0] + at, self.rank * piece)
            self._fold(op, [op.outs[0][0] + at], slots, count)

    def broadcast(self, op: Op) -> Steps:
        for at, count in chunks(op.nbytes):
            own = yield from self._enter(op)
            if op.root == self.rank:
                ctypes.memmove(own, op.ins[0][0] + at, count)
                yield from self._meet(op, ())
            else:
                phase = yield from self._meet(op, [op.root])
                ctypes.memmove(op.outs[0][0] + at, self.segment.data(op.root, phase), count)

    def all_gather(self, op: Op) -> Steps:
        for at, _ in chunks(max(nbytes for _, nbytes in op.outs)):
            own = yield from self._enter(op)
            _copy(own, op.ins[0], at, CHUNK, into=False)
            phase = yield from self._meet(op, self.others)
            for r in self.others:
                _copy(self.segment.data(r, phase), op.outs[r], at, CHUNK, into=True)

    def gather(self, op: Op) -> Steps:
        root = op.root == self.rank
        for at, count in chunks(op.nbytes):
            own = yield from self._enter(op)
            if not root:
                ctypes.memmove(own, op.ins[0][0] + at, count)
            phase = yield from self._meet(op, self.others if root else ())
            for r in self.others if root else ():
                ctypes.memmove(op.outs[r][0] + at, self.segment.data(r, phase), count)

    def scatter(self, op: Op) -> Steps:
        piece, root = self._piece(), op.root == self.rank
        for at, count in chunks(op.nbytes, piece):
            own = yield from self._enter(op)
            for r in self.others if root else ():
                ctypes.memmove(own + r * piece, op.ins[r][0] + at, count)
            phase = yield from self._meet(op, () if root else [op.root])
            if not root:
                ctypes.memmove(op.outs[0][0] + at, self.segment.data(op.root, phase) + self.rank * piece, count)

    def all_to_all(self, op: Op) -> Steps:
        """The first phase tells how much every rank sends to every other."""
        sizes = struct.Struct(f"={self.size}Q")
        own = yield from self._enter(op, most=max((op.ins[r][1] for r in self.others), default=0))
        ctypes.memmove(own, sizes.pack(*(nbytes for _, nbytes in op.ins)), sizes.size)
        phase = yield from self._meet(op, self.others)
        for r in self.others:
            sent = sizes.unpack(ctypes.string_at(self.segment.data(r, phase), sizes.size))[self.rank]
            if sent != op.outs[r][1]:
                raise ShmFailure(
                    f"rank {self._names[r]} sends {sent} bytes in an all_to_all to rank {self._names[self.rank]}, "
                    f"which expects {op.outs[r][1]}"
                )
        most, piece = max(self.segment.said(r, phase).most for r in range(self.size)), self._piece()
        for at in range(0, most, piece):
            own = yield from self._enter(op, most=most)
            for r in self.others:
                _copy(own + r * piece, op.ins[r], at, piece, into=False)
            phase = yield from self._meet(op, self.others)
            for r in self.others:
                _copy(self.segment.data(r, phase) + self.rank * piece, op.outs[r], at, piece, into=True)

    # Inside.

    def _keep_own(self, op: Op) -> None:
        """What a rank sends to itself."""
        if op.kind in ROOTED and op.root != self.rank:
            return
        source = op.ins[self.rank] if len(op.ins) > 1 else op.ins[0]
        target = op.outs[self.rank] if len(op.outs) > 1 else op.outs[0]
        ctypes.memmove(target[0], source[0], source[1])

    def _piece(self) -> int:
        """Bytes of a chunk that one rank gets."""
        return CHUNK // self.size // LINE * LINE

    def _share(self, nbytes: int, rank: int) -> tuple[int, int]:
        """Offset and length of what `rank` sums of `nbytes`, in whole lines."""
        each = -(-nbytes // self.size // LINE) * LINE
        at = min(each * rank, nbytes)
        return at, min(each, nbytes - at)

    def _slots(self, phase: int, own: int, offset: int = 0) -> list[int]:
        return [own if r == self.rank else self.segment.data(r, phase) + offset for r in range(self.size)]

    def _fold(self, op: Op, targets: Sequence[int], sources: Sequence[int], nbytes: int) -> None:
        fold(targets, sources, nbytes, TYPES[op.dtype], NAMES[op.reduction], self._scratch)

    def _in_heap(self, address: int) -> int:
        start, length = self._heaps[self.rank]
        return address - start if start <= address < start + length else -1


def _copy(slot: int, tensor: tuple[int, int], at: int, size: int, *, into: bool) -> None:
    """At most `size` bytes between a slot and a tensor from its byte `at` on; nothing beyond its end."""
    address, count = tensor[0] + at, min(size, tensor[1] - at)
    if count > 0:
        ctypes.memmove(*((address, slot) if into else (slot, address)), count)


def _compared(said: Said, nbytes: int) -> tuple[int, ...]:
    """What must be alike on all ranks."""
    if said.kind == Kind.BARRIER:
        return (said.kind, said.serial)
    reduction = said.reduction if said.kind in SUMMING else 0
    size = 0 if said.kind == Kind.ALL_TO_ALL else nbytes
    return (said.kind, said.serial, said.dtype, said.root, reduction, size)


def _described(said: Said) -> str:
    if said.kind == Kind.BARRIER:
        return "a barrier"
    dtype = TYPES[said.dtype]
    text = f"{Kind(said.kind).name.lower()} of {said.nbytes // dtype.itemsize} {str(dtype).removeprefix('torch.')}"
    if said.kind in SUMMING:
        text += f" by {NAMES[said.reduction].lower()}"
    return text + (f" with root {said.root}" if said.kind in ROOTED else "")
