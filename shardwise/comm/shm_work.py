"""Work of the `shm` backend: what an operation that was started hands back."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from shardwise.comm.kernel import Outcome

if TYPE_CHECKING:
    from shardwise.comm.shm import Shm

FOREVER = 1e6  # seconds
SLICE_S = 0.1  # how long a wait stays away from Python, whose signal handlers must get their turn


class ShmFailure(RuntimeError):
    """The group ended: a rank died, ranks called different operations, or somebody aborted it. The text says who."""


class Started(Protocol):
    """Work as `GuardedWork` and torch use it."""

    def wait(self, timeout: timedelta | None = None) -> bool: ...
    def is_completed(self) -> bool: ...
    def is_success(self) -> bool: ...
    def exception(self) -> Exception | None: ...
    def get_future(self) -> torch.futures.Future[Any]: ...
    def result(self) -> Any: ...


class ShmWork:
    """One operation. `back` lists tensors to fill from contiguous copies once it has ended."""

    def __init__(self, owner: Shm, handle: int, tensors: Any, back: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._owner = owner
        self._handle = handle
        self._tensors = tensors
        self._back = back
        self._outcome: int = Outcome.AGAIN

    def __del__(self) -> None:
        if self._outcome == Outcome.AGAIN and self._owner.test(self._handle) == Outcome.AGAIN:
            self._owner.adopt(self._handle, self._tensors)
        else:
            self._owner.release(self._handle)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the operation has ended. Raises ShmFailure when the group has, RuntimeError after `timeout`."""
        seconds = timeout.total_seconds() if timeout else FOREVER
        while self._outcome == Outcome.AGAIN and seconds > 0:
            self._settle(self._owner.wait(self._handle, min(seconds, SLICE_S)))
            seconds -= SLICE_S
        if self._outcome == Outcome.FAILED:
            raise ShmFailure(self._owner.why())
        if self._outcome == Outcome.AGAIN:
            raise RuntimeError("the operation has not ended")
        return True

    def is_completed(self) -> bool:
        if self._outcome == Outcome.AGAIN:
            self._settle(self._owner.test(self._handle))
        return self._outcome != Outcome.AGAIN

    def is_success(self) -> bool:
        return self.is_completed() and self._outcome == Outcome.OK

    def exception(self) -> Exception | None:
        return ShmFailure(self._owner.why()) if self._outcome == Outcome.FAILED else None

    def result(self) -> Any:
        return _results(self._tensors)

    def source(self) -> int:
        return self._owner.source(self._handle)

    _source_rank = source

    def get_future(self) -> torch.futures.Future[Any]:
        return self._owner.completer().promise(self, self.result())

    def _settle(self, outcome: int) -> None:
        if outcome == Outcome.OK and self._outcome == Outcome.AGAIN:
            for tensor, copy in self._back:
                tensor.copy_(copy)
        self._outcome = outcome


class Together:
    """One work for several that were started one after the other."""

    def __init__(self, works: Sequence[Started], owner: Shm) -> None:
        self._works = works
        self._owner = owner

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def exception(self) -> Exception | None:
        return next((work.exception() for work in self._works if work.exception()), None)

    def result(self) -> Any:
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> torch.futures.Future[Any]:
        return self._owner.completer().promise(self, self.result())


class Completer:
    """Completes futures, in the order in which they were asked for, on a thread that starts with the first."""

    def __init__(self) -> None:
        self._promises: queue.SimpleQueue[tuple[Started, torch.futures.Future[Any], Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="shm futures").start()

    def promise(self, work: Started, result: Any) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        self._promises.put((work, future, result))
        return future

    def stop(self) -> None:
        """End the thread after what has been promised."""
        self._promises.put(None)

    def _run(self) -> None:
        while (promised := self._promises.get()) is not None:
            work, future, result = promised
            try:
                work.wait()
            except RuntimeError as error:
                with contextlib.suppress(RuntimeError):
                    future.set_exception(error)
            else:
                future.set_result(result)
            del promised, work, future, result


def _results(tensors: Any) -> Any:
    return list(tensors)
