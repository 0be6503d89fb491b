"""`Heap`: tensors in the memory that the ranks of a host share."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

from shardwise.errors import CommError

PAGE = 4096


class Heap:
    """A rank's own part of the segment: `size` bytes of addresses from `start` on, given out first fit, in pages."""

    def __init__(self, segment: mmap.mmap, start: int, size: int) -> None:
        self._segment = segment
        self._free = [(start, size)]

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor of zeros; its memory comes back when the last view of it is gone. Raises CommError when full."""
        nbytes = max(1, numel * dtype.itemsize)
        pages = -(-nbytes // PAGE) * PAGE
        for index, (start, size) in enumerate(self._free):
            if size >= pages:
                self._free[index : index + 1] = [(start + pages, size - pages)] if size > pages else []
                memory = (ctypes.c_char * nbytes).from_buffer(self._segment, start)
                weakref.finalize(memory, _give_back, weakref.ref(self), start, pages)
                return torch.frombuffer(memory, dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)
        raise CommError(f"no room for a tensor of {nbytes} bytes in the memory that the ranks share.")

    def _insert(self, start: int, size: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the segment is closed
            self._segment.madvise(mmap.MADV_REMOVE, start, size)
        joined: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (start, size)]):
            if joined and sum(joined[-1]) == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self._free = joined


def _give_back(heap: weakref.ref[Heap], start: int, size: int) -> None:
    owner = heap()
    if owner is not None:
        owner._insert(start, size)
