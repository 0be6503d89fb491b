"""`GuardedWork`: one operation in flight, whose wait has a limit and ends at once when the group is aborted."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed.distributed_c10d as dist

if TYPE_CHECKING:
    from shardwise.comm.group import Group

SLICE_S = 0.1  # how often a waiting caller looks whether its group was aborted; a finished operation wakes it at once


class Tag(NamedTuple):
    """Which operation of a group this is: a mismatch between ranks shows in these."""

    generation: int
    step: int
    sequence: int
    op: str


class GuardedWork(dist.Work):
    """What `Group` returns for an operation: waits at most the group's limit and raises CommError, never hangs.

    `whole` are tensors that must live until the operation has ended.
    """

    def __init__(self, group: Group, tag: Tag, inner: Any, whole: Any = None) -> None:
        super().__init__()
        self._group = group
        self._tag = tag
        self._inner = inner
        self._whole = whole

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Block until the operation has ended on this rank. Raises CommError on failure, abort or after the limit."""
        if self._group.asynchronous:
            return self._on_stream()
        limit = timeout.total_seconds() or self._group.timeout_s
        deadline = time.monotonic() + limit
        while True:
            slice_s = min(SLICE_S, max(1e-3, deadline - time.monotonic()))
            try:
                self._inner.wait(timedelta(seconds=slice_s))
                return True
            except RuntimeError:
                if self._group.aborted:
                    raise self._group.aborted_error(self._tag) from None
                if self._inner.is_completed():
                    return self._end()
            if time.monotonic() >= deadline:
                raise self._group.timed_out(self._tag, limit)

    def _end(self) -> bool:
        """Of an operation that has ended: it may have done so, and well, just after a slice of the wait ran out."""
        try:
            self._inner.wait()
        except RuntimeError as error:
            raise self._group.failed(self._tag, error) from None
        return True

    def _on_stream(self) -> bool:
        """A device's queue: the wait is only ordered here, the backend's own watchdog limits it."""
        if self._group.aborted:
            raise self._group.aborted_error(self._tag)
        try:
            return bool(self._inner.wait())
        except RuntimeError as error:
            raise self._group.failed(self._tag, error) from None

    def is_completed(self) -> bool:
        return bool(self._inner.is_completed())

    def is_success(self) -> bool:
        return bool(self._inner.is_success())

    def exception(self) -> Any:
        return self._inner.exception()

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = self._inner.get_future()
        return future

    def result(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self._inner.result()
        return found

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return int(self._inner._source_rank())

    def _source_rank(self) -> int:
        return self.source_rank()
