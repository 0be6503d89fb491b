"""`Messages`: tensors from one rank to another with a tag, through a pipe for each pair in a `Segment`."""

from __future__ import annotations

import collections
import ctypes
import struct
from collections.abc import Sequence

from shardwise.comm.kernel import Kind
from shardwise.comm.shm_work import ShmFailure
from shardwise.comm.torch_phases import Op, Steps
from shardwise.comm.torch_segment import HEADER, PIPE, Segment

FRAME = struct.Struct("=qQ")  # a message's tag and length; frames begin at multiples of their own size
READ = 8  # words from a pipe's counter of bytes written to that of bytes read


class Messages:
    """The streams between this rank and each other. `advance` goes as far as the others let it."""

    def __init__(self, segment: Segment, names: Sequence[int]) -> None:
        self.segment = segment
        self.open = 0
        self._names = names
        self._receives: list[Op] = []
        self._sends: list[collections.deque[Op]] = [collections.deque() for _ in range(segment.size)]
        self._kept: list[list[tuple[int, bytes]]] = [[] for _ in range(segment.size)]
        self._streams: list[Steps] = []

    def post(self, op: Op) -> None:
        """Start a message to or from `op.peer` (-1: from anybody)."""
        if not self._streams:
            size = self.segment.size
            self._streams = [*map(self._sending, range(size)), *map(self._receiving, range(size))]
        self.open += 1
        if op.kind is Kind.SEND:
            self._sends[op.peer].append(op)
            return
        for origin in range(self.segment.size) if op.peer < 0 else [op.peer]:
            for message in self._kept[origin]:
                if message[0] == op.tag:
                    self._kept[origin].remove(message)
                    self._land(op, origin, message[1])
                    return
        self._receives.append(op)

    def advance(self) -> None:
        for stream in self._streams if self.open else ():
            next(stream)

    def _sending(self, target: int) -> Steps:
        pipe, queue = self.segment.pipe(self.segment.rank, target), self._sends[target]
        while True:
            while not queue:
                yield
            op = queue[0]
            yield from self._pour(pipe, FRAME.pack(op.tag, op.nbytes), FRAME.size)
            yield from self._pour(pipe, op.ins[0][0], op.nbytes)
            queue.popleft()
            self._end(op)

    def _receiving(self, origin: int) -> Steps:
        pipe = self.segment.pipe(origin, self.segment.rank)
        frame = ctypes.create_string_buffer(FRAME.size)
        while True:
            while not self._receives:  # what nobody asks for stays in the pipe, and its sender waits
                yield
            yield from self._drain(pipe, ctypes.addressof(frame), FRAME.size)
            tag, nbytes = FRAME.unpack(frame.raw)
            op = self._asked_for(origin, tag)
            if op is not None:
                self._fits(op, origin, nbytes)
                yield from self._drain(pipe, op.outs[0][0], nbytes)
                op.peer = origin
                self._end(op)
                continue
            came = ctypes.create_string_buffer(max(1, nbytes))
            yield from self._drain(pipe, ctypes.addressof(came), nbytes)
            op = self._asked_for(origin, tag)  # somebody may have asked while it came
            if op is not None:
                self._land(op, origin, came.raw[:nbytes])
            else:
                self._kept[origin].append((tag, came.raw[:nbytes]))

    def _asked_for(self, origin: int, tag: int) -> Op | None:
        for op in self._receives:
            if op.peer in (origin, -1) and op.tag == tag:
                self._receives.remove(op)
                return op
        return None

    def _fits(self, op: Op, origin: int, nbytes: int) -> None:
        if op.nbytes != nbytes:
            raise ShmFailure(
                f"rank {self._names[origin]} sent {nbytes} bytes with tag {op.tag} where rank "
                f"{self._names[self.segment.rank]} receives {op.nbytes}"
            )

    def _land(self, op: Op, origin: int, came: bytes) -> None:
        self._fits(op, origin, len(came))
        ctypes.memmove(op.outs[0][0], came, len(came))
        op.peer = origin
        self._end(op)

    def _end(self, op: Op) -> None:
        op.done = True
        self.open -= 1

    # Bytes in and out of a pipe. Each piece takes a multiple of a frame's size: no frame lies across the pipe's end.

    def _pour(self, pipe: int, source: int | bytes, nbytes: int) -> Steps:
        words, counter = self.segment.words, pipe // 8
        while nbytes:
            room = PIPE - (words[counter] - words[counter + READ])
            at = words[counter] % PIPE
            count = min(nbytes, room, PIPE - at)
            if not count:
                yield
                continue
            self.segment.in_order()
            ctypes.memmove(self.segment.start + pipe + HEADER + at, source, count)
            self.segment.in_order()
            nbytes -= count
            words[counter] += count if nbytes else _whole(count)
            if isinstance(source, int):
                source += count

    def _drain(self, pipe: int, target: int, nbytes: int) -> Steps:
        words, counter = self.segment.words, pipe // 8
        while nbytes:
            there = words[counter] - words[counter + READ]
            at = words[counter + READ] % PIPE
            count = min(nbytes, there, PIPE - at)
            if not count:
                yield
                continue
            self.segment.in_order()
            ctypes.memmove(target, self.segment.start + pipe + HEADER + at, count)
            self.segment.in_order()
            nbytes -= count
            words[counter + READ] += count if nbytes else _whole(count)
            target += count


def _whole(nbytes: int) -> int:
    return -(-nbytes // FRAME.size) * FRAME.size
