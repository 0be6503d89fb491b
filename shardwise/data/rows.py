"""Rows of a fixed size in a file, read at offsets: no memory is mapped, so resident memory does not grow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwise.errors import DataError


class RowFile:
    """`count` rows of `length` items each, a new one beginning every `stride` items, in a file of plain numbers.

    A memory-mapped read of a shuffled corpus ends with the whole file counted as resident; `pread` does not, and at
    1 us a row it is not slower. Safe to share over threads and forks: reading moves no file position.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, *, length: int, stride: int, count: int) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.length, self.stride, self.count = length, stride, count
        self._fd = -1

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> npt.NDArray[Any]:
        """[len(indices), length] items, read-only. Raises DataError when the file has changed or cannot be read."""
        if self._fd < 0:
            self._fd = self._open()
        fd, step, size = self._fd, self.stride * self.dtype.itemsize, self.length * self.dtype.itemsize
        pread = os.pread
        try:
            raw = b"".join([pread(fd, size, index * step) for index in indices])
        except OSError as error:
            raise DataError(f"The prepared data in {self.path} cannot be read: {error.strerror}.") from error
        if len(raw) != size * len(indices):
            raise DataError(
                f"The prepared data in {self.path} became shorter since it was made. Delete that folder; the next run "
                "makes it again."
            )
        return np.frombuffer(raw, dtype=self.dtype).reshape(len(indices), self.length)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.dtype.str, self.length, self.stride, self.count)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"The prepared data in {self.path} cannot be opened: {error.strerror}.") from error


def _reopen(path: Path, dtype: str, length: int, stride: int, count: int) -> RowFile:
    return RowFile(path, dtype, length=length, stride=stride, count=count)
