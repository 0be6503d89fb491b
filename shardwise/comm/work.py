"""`GuardedWork`: one operation in flight, whose wait has a limit and ends at once when the group is aborted."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed.distributed_c10d as dist

from shardwise.comm.shm_work import SLICE_S, ShmWork
from shardwise.errors import CommError

if TYPE_CHECKING:
    from shardwise.comm.group import Group

profiling = torch._C._autograd._profiler_enabled


class Tag(NamedTuple):
    """Which operation of a group this is: a mismatch between ranks shows in these."""

    generation: int
    step: int
    sequence: int
    op: str
    peer: int | None = None


def section(backend: str, op: str, what: str = "") -> torch.profiler.record_function:
    """What the profiler shows of an operation, named as torch names gloo's: "shm:all_reduce"."""
    return torch.profiler.record_function(f"{backend}:{op}{what}")


class _Ordered:
    """In the place of the work that nccl does not return for an operation already in order on the current stream."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._tensors)
        return future

    def result(self) -> Any:
        return self._tensors

    def _source_rank(self) -> int:
        return -1


class GuardedWork(dist.Work):
    """What `Group` returns for an operation: waits at most the group's limit and raises CommError, never hangs.

    `tensors` must live until the operation has ended. `on_stream` is for devices with a queue of their own: there a
    wait only orders what follows, and the backend's watchdog limits it.
    """

    def __init__(self, group: Group, tag: Tag, inner: Any, tensors: Any, *, on_stream: bool) -> None:
        super().__init__()
        self._group = group
        self._tag = tag
        self._inner = inner if inner is not None else _Ordered(tensors)
        self._tensors = tensors
        self._on_stream = on_stream

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Block until the operation has ended on this rank. Raises CommError on failure, abort or after the limit."""
        if self._on_stream:
            if self._group.aborted:
                raise self._group.aborted_error(self._tag)
            with self._group.waits.on_stream(self._group, self._tag.sequence):
                return self._end()
        began = time.perf_counter()
        try:
            return self._wait(timeout)
        finally:
            self._group.waits.ended(self._group, self._tag.sequence, began)

    def _wait(self, timeout: timedelta) -> bool:
        limit = timeout.total_seconds() or self._group.timeout_s
        deadline = time.monotonic() + limit
        while True:
            if self._ends_within(min(SLICE_S, max(1e-3, deadline - time.monotonic()))):
                return True
            if self._group.aborted:
                raise self._group.aborted_error(self._tag)
            if self._inner.is_completed():
                return self._end()
            if time.monotonic() >= deadline:
                raise self._group.timed_out(self._tag, limit)

    def _ends_within(self, seconds: float) -> bool:
        """Block at most so long; whether the operation has ended well."""
        if isinstance(self._inner, ShmWork):
            with section("shm", self._tag.op, " wait") if profiling() else contextlib.nullcontext():
                return self._inner.ends_within(seconds)
        try:
            self._inner.wait(timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def _end(self) -> bool:
        """Of an operation that has ended: it may have done so, and well, just after a slice of the wait ran out."""
        try:
            self._inner.wait()
        except RuntimeError as error:
            raise self._group.failed(self._tag, error) from None
        return True

    def is_completed(self) -> bool:
        return bool(self._inner.is_completed())

    def is_success(self) -> bool:
        return bool(self._inner.is_success())

    def exception(self) -> Any:
        return self._inner.exception()

    def get_future(self) -> torch.futures.Future[Any]:
        """The backend's own; where it has none, one that a thread of its own completes, so that callbacks may wait."""
        future: torch.futures.Future[Any]
        if hasattr(self._inner, "get_future"):
            future = self._inner.get_future()
        else:
            future = torch.futures.Future()
            threading.Thread(target=self._complete, args=(future,), daemon=True, name="future").start()
        return future

    def _complete(self, future: torch.futures.Future[Any]) -> None:
        try:
            self.wait()
        except CommError as error:
            future.set_exception(error)
        else:
            future.set_result(self.result())

    def result(self) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self._inner.result()
        return found

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        return int(self._inner._source_rank())

    def _source_rank(self) -> int:
        return self.source_rank()
