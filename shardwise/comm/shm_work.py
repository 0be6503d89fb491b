"""Work of the `shm` backend: what an operation that was started hands back."""

from __future__ import annotations

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
    """Work as `GuardedWork` uses it."""

    def wait(self, timeout: timedelta | None = None) -> bool: ...
    def is_completed(self) -> bool: ...
    def is_success(self) -> bool: ...
    def exception(self) -> Exception | None: ...
    def result(self) -> list[Any]: ...


class ShmWork:
    """One operation. `given` must live until it has ended; `results` are what torch hands to its caller.

    `back` lists tensors to fill from contiguous copies once it has ended.
    """

    def __init__(
        self, owner: Shm, handle: int, given: Any, results: list[Any], back: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._owner = owner
        self._handle = handle
        self._given = given
        self._results = results
        self._back = list(back)
        self._outcome: int = Outcome.AGAIN
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self._owner.drop(self._handle, (self._given, self._results), ended=self._outcome != Outcome.AGAIN)

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

    def ends_within(self, seconds: float) -> bool:
        """Block at most so long; whether the operation has ended well."""
        if self._outcome == Outcome.AGAIN:
            self._settle(self._owner.wait(self._handle, seconds))
        return self._outcome == Outcome.OK

    def is_completed(self) -> bool:
        if self._outcome == Outcome.AGAIN:
            self._settle(self._owner.test(self._handle))
        return self._outcome != Outcome.AGAIN

    def is_success(self) -> bool:
        return self.is_completed() and self._outcome == Outcome.OK

    def exception(self) -> Exception | None:
        return ShmFailure(self._owner.why()) if self._outcome == Outcome.FAILED else None

    def result(self) -> list[Any]:
        return self._results

    def returns(self, results: list[Any], back: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Say anew what the caller gets, and what to fill when the operation has ended."""
        self._results = results
        self._back += back

    def _source_rank(self) -> int:
        return self._owner.source(self._handle)

    def _settle(self, outcome: int) -> None:
        """Once, whichever thread is first: the copies go back, and the outcome stays."""
        if outcome == Outcome.AGAIN:
            return
        with self._lock, torch.no_grad():
            if outcome == Outcome.OK and self._outcome == Outcome.AGAIN:
                for tensor, copy in self._back:
                    tensor.copy_(copy)
            self._outcome = outcome


class Together:
    """One work for several that were started one after the other."""

    def __init__(self, works: Sequence[Started]) -> None:
        self._works = works

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

    def result(self) -> list[Any]:
        return [tensor for work in self._works for tensor in work.result()]
