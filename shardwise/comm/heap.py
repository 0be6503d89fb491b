"""`Heap`: tensors in the memory that the ranks of a host share."""

from __future__ import annotations

import collections
import ctypes
import functools
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor


class Heap:
    """A rank's own part of the segment: `size` bytes of addresses from `start` on, given out first fit, in pages."""

    def __init__(self, segment: mmap.mmap, start: int, size: int) -> None:
        self._segment = segment
        self._free = [(start, size)]
        self._returned: collections.deque[tuple[int, int]] = collections.deque()
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor | None:
        """A 1-D tensor of zeros, or None when there is no room; its memory comes back when its last view is gone."""
        nbytes = max(1, numel * dtype.itemsize)
        pages = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            if self._closed:
                return None
            self._take_back()
            index = next((i for i, (_, size) in enumerate(self._free) if size >= pages), None)
            if index is None:
                return None
            start, size = self._free[index]
            self._free[index : index + 1] = [(start + pages, size - pages)] if size > pages else []
        memory = (ctypes.c_char * nbytes).from_buffer(self._segment, start)
        # A finalizer may run in the middle of anything, on any thread: it only notes what came back.
        back = functools.partial(_note, self._returned, self._process, start, pages)
        weakref.finalize(memory, back).atexit = False
        return torch.frombuffer(memory, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)

    def close(self) -> None:
        """Nothing is given out any more: after a failure a peer may still write into what was."""
        self._closed = True

    def _take_back(self) -> None:
        while self._returned:
            start, size = self._returned.popleft()
            try:
                self._segment.madvise(mmap.MADV_REMOVE, start, size)
            except OSError:
                ctypes.memset(ctypes.addressof((ctypes.c_char * size).from_buffer(self._segment, start)), 0, size)
            joined: list[tuple[int, int]] = []
            for begin, length in sorted([*self._free, (start, size)]):
                if joined and sum(joined[-1]) == begin:
                    joined[-1] = (joined[-1][0], joined[-1][1] + length)
                else:
                    joined.append((begin, length))
            self._free = joined


def _note(returned: collections.deque[tuple[int, int]], process: int, start: int, size: int) -> None:
    if os.getpid() == process:  # a forked child shares the memory, but it is not its own
        returned.append((start, size))
