"""`Segment`: what the ranks of a host keep in the memory that they share, where no compiled kernel does it."""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
import time
from typing import NamedTuple

LINE, SLOTS, HEADER = 64, 2, 128
CHUNK = 1 << 20  # bytes that a rank writes before the others read: a turn costs tens of microseconds in Python
PIPE = 256 << 10  # bytes that a message may run ahead of its receiver
RECORD, LEFT, FAILED_AT, WHY = 1024, 1, 8, 128  # a rank's record: its counter, then words 1 and 8, and a text at a byte
TEXT = RECORD - WHY
SAID = struct.Struct("=QQQqIIII")


class Said(NamedTuple):
    """With every chunk: what its writer believes is going on. `heap` is where its tensor lies there, or -1."""

    serial: int
    nbytes: int
    most: int
    heap: int
    kind: int
    dtype: int
    reduction: int
    root: int


def fixed_bytes(size: int) -> int:
    """Bytes before the heaps: a flag, a record for each rank, slots, and a pipe for each pair; whole large pages."""
    end = _pipes_at(size) + size * size * (HEADER + PIPE)
    return -(-end // 65536) * 65536


def _pipes_at(size: int) -> int:
    return LINE + size * (RECORD + SLOTS * (HEADER + CHUNK))


class Segment:
    """Counters, slots and pipes of `size` ranks in `memory`, which was zeros when it was made.

    A rank writes a chunk and then raises its counter; the others read the counter and then the chunk. A counter is one
    aligned word, which Python writes and reads at once.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.others = [r for r in range(size) if r != rank]
        self.memory = memory
        self.words = memoryview(memory).cast("B").cast("Q")
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.turnstile = threading.RLock()
        self.moves = 0  # how often this rank has written or read something: whoever waits looks sooner then

    def in_order(self) -> None:
        """What was written before is seen before what is written after, and read likewise.

        A lock that is let go and taken again orders memory on every processor; x86 alone would need none.
        """
        self.moves += 1
        with self.turnstile:
            pass
        with self.turnstile:
            pass

    def _record(self, rank: int) -> int:
        return LINE + rank * RECORD

    def count(self, rank: int) -> int:
        """Phases that `rank` has arrived at."""
        return self.words[self._record(rank) // 8]

    def arrive(self, count: int) -> None:
        self.in_order()
        self.words[self._record(self.rank) // 8] = count

    def has_left(self, rank: int) -> bool:
        """Whether it ended without an error."""
        return self.words[self._record(rank) // 8 + LEFT] != 0

    def leave(self) -> None:
        self.words[self._record(self.rank) // 8 + LEFT] = 1

    # Chunks.

    def data(self, rank: int, phase: int) -> int:
        """The address of the chunk that `rank` writes in a phase. Two slots: the others may still read the last."""
        return self.start + self._slot(rank, phase) + HEADER

    def _slot(self, rank: int, phase: int) -> int:
        return LINE + self.size * RECORD + (rank * SLOTS + phase % SLOTS) * (HEADER + CHUNK)

    def say(self, phase: int, said: Said) -> None:
        SAID.pack_into(self.memory, self._slot(self.rank, phase), *said)

    def said(self, rank: int, phase: int) -> Said:
        return Said._make(SAID.unpack_from(self.memory, self._slot(rank, phase)))

    def pipe(self, origin: int, target: int) -> int:
        """Where the stream of messages between two ranks begins: two counters, then PIPE bytes from HEADER on."""
        return _pipes_at(self.size) + (origin * self.size + target) * (HEADER + PIPE)

    # Failure.

    @property
    def failed(self) -> bool:
        return self.words[0] != 0

    def fail(self, why: str) -> None:
        """End the group on all ranks. Each rank has its own place for a reason: the earliest is everybody's."""
        with self.turnstile:
            at = self._record(self.rank)
            if not self.failed:
                raw = why.encode()[: TEXT - 1]
                self.memory[at + WHY : at + WHY + len(raw)] = raw
                self.in_order()
                self.words[at // 8 + FAILED_AT] = time.monotonic_ns()
            self.in_order()
            self.words[0] = 1

    def why(self) -> str:
        """Why the group ended; empty while it lives."""
        told = [(self.words[self._record(r) // 8 + FAILED_AT], self._record(r) + WHY) for r in range(self.size)]
        at = min((each for each in told if each[0]), default=(0, 0))[1]
        return self.memory[at : at + TEXT].split(b"\0")[0].decode(errors="replace") if at else ""
