"""A file for what does not fit into memory: written and read past the system's file cache, gone with its process.

It has no name from the start, so nothing is left of it whatever ends the run. Every operation has a limit.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from shardwise.errors import RunError
from shardwise.units import format_bytes

ALIGN = 4096  # of places in the file, of sizes and of memory, which reading past the cache asks for
LIMIT_S = 300.0
MOST_IDLE = 64 * 2**20  # bytes of memory that wait to be used again
T = TypeVar("T")


class Place(NamedTuple):
    """`size` bytes of the file from `offset` on."""

    offset: int
    size: int


class Buffer:
    """Memory that the file can be read into and written from, and `data`, the flat tensor that lies in it."""

    def __init__(self, memory: mmap.mmap, dtype: torch.dtype, count: int) -> None:
        self.memory = memory
        self.data = torch.frombuffer(memory, dtype=dtype, count=count)


class Spill:
    """The file, in `folder` or where temporary files are. `read` and `write` may be called from any thread.

    Raises RunError where the disk is full or fails.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = str(folder or tempfile.gettempdir())
        self._size = 0
        self.buffered = 0  # bytes of memory that it has for reading and writing
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="spill")  # one reads ahead, one writes behind
        self._free: dict[int, list[mmap.mmap]] = {}
        self._idle = 0
        self._pending: set[Future[Any]] = set()
        self._map: mmap.mmap | None = None  # of all of the file, or of what it was
        self._closed = False
        try:
            handle, path = tempfile.mkstemp(prefix="shardwise-", dir=self.folder)
        except OSError as error:
            raise self._failed("created", error) from None
        self._cached = handle
        self.direct = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_DIRECT)
            self.direct = True
        except (AttributeError, OSError):  # another system, or a file system that cannot
            self._file = os.dup(handle)
        finally:
            os.unlink(path)

    def reserve(self, size: int) -> Place:
        """A place for `size` bytes, which the disk has from now on."""
        padded = padding(size)
        with self._lock:
            place = Place(self._size, size)
            self._size += padded
        try:
            if hasattr(os, "posix_fallocate") and padded:
                os.posix_fallocate(self._cached, place.offset, padded)
            else:
                os.ftruncate(self._cached, self._size)
        except OSError as error:
            raise self._failed("extended", error) from None
        return place

    def write(self, place: Place, start: int, buffer: Buffer) -> None:
        """Put what is in a buffer at byte `start` of a place, a multiple of ALIGN."""
        try:
            _whole(os.pwritev, self._file, buffer.memory, place.offset + start)
            if not self.direct:
                os.fdatasync(self._file)
                self._forget(place)
        except OSError as error:
            raise self._failed("written", error) from None

    def read(self, place: Place, start: int, dtype: torch.dtype, count: int) -> Buffer:
        """`count` elements from byte `start` of a place on."""
        buffer = self.buffer(dtype, count)
        try:
            _whole(os.preadv, self._file, buffer.memory, place.offset + start)
            if not self.direct:
                self._forget(place)
        except OSError as error:
            raise self._failed("read", error) from None
        return buffer

    def buffer(self, dtype: torch.dtype, count: int) -> Buffer:
        """Memory for `count` elements, to be given back to `recycle`."""
        size = padding(count * dtype.itemsize)
        with self._lock:
            waiting = self._free.get(size)
            if waiting:
                self._idle -= size
                return Buffer(waiting.pop(), dtype, count)
            while self._idle > MOST_IDLE:  # of sizes that have gone out of use
                self._drop()
            self.buffered += size
        return Buffer(mmap.mmap(-1, size), dtype, count)

    def _drop(self) -> None:
        size = next(size for size, waiting in self._free.items() if waiting)
        self._free[size].pop()
        self._idle -= size
        self.buffered -= size

    def recycle(self, buffer: Buffer) -> None:
        """Nobody looks at this buffer any more."""
        with self._lock:
            self._free.setdefault(len(buffer.memory), []).append(buffer.memory)
            self._idle += len(buffer.memory)

    def mapped(self, place: Place, dtype: torch.dtype, count: int) -> Tensor:
        """What lies in a place as a tensor that takes no memory of its own: the system reads it as it is looked at."""
        if self._map is None or len(self._map) < place.offset + padding(place.size):
            self._map = mmap.mmap(self._cached, self._size)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=place.offset)

    def settle(self) -> None:
        """What was written through `mapped` is on disk and out of the file cache."""
        self._map = None  # as long as it is mapped it stays there
        os.fsync(self._cached)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_DONTNEED)

    def later(self, work: Callable[..., T], *what: Any) -> Future[T]:
        """Do it on another thread; `wait` has the result."""
        found = self._threads.submit(work, *what)
        self._pending.add(found)
        found.add_done_callback(self._pending.discard)
        return found

    def wait(self, work: Future[T]) -> T:
        """The result. Raises RunError when it is not there after `LIMIT_S`."""
        try:
            return work.result(LIMIT_S)
        except Late:
            raise RunError(
                f"the disk under {self.folder} did not answer for {LIMIT_S:.0f} s, where the plan has put what it "
                "offloads. Look at the disk, or leave offload out."
            ) from None

    def close(self) -> None:
        """Give the disk its room back; what is still under way after LIMIT_S keeps the file open."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        late = wait(set(self._pending), LIMIT_S).not_done
        self._free.clear()
        self._map = None
        if not late:
            for handle in {self._file, self._cached}:
                os.close(handle)

    def _forget(self, place: Place) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, place.offset, padding(place.size), os.POSIX_FADV_DONTNEED)

    def _failed(self, what: str, error: OSError) -> RunError:
        needs = f" with {format_bytes(self._size)} in it" if self._size else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Make room there" if full else "Look at the disk"
        return RunError(
            f"the file for what the plan offloads could not be {what}{needs}, in {self.folder}: "
            f"{error.strerror or error}. {advice}, run from another folder, or leave offload out. A step that had "
            "begun is not whole: go on from the last checkpoint."
        )


def padding(size: int) -> int:
    """`size` rounded up to what the file takes."""
    return -(-size // ALIGN) * ALIGN


def _whole(move: Any, file: int, memory: mmap.mmap, offset: int) -> None:
    """Reads and writes may be shorter than asked for."""
    raw, done = memoryview(memory), 0
    while done < len(raw):
        moved = move(file, [raw[done:]], offset + done)
        if moved <= 0:
            raise OSError(errno.EIO, "the file is shorter than what was put into it")
        done += moved
