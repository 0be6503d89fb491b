"""`Waits`: how long callers waited for the operations of a group, whoever started them and for whatever."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

PENDING = 1024  # waits of a stream whose length is not known yet


class Waits:
    """Seconds by thread, so that a thread that only waits (a server's) does not count as waiting of a training step.

    A wait on a CUDA stream takes the caller no time: there the stream's own stall is measured, between two events, and
    counts for all threads once it is over.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._by_thread: dict[int, float] = collections.defaultdict(float)
        self._pending: collections.deque[tuple[Any, Any]] = collections.deque(maxlen=PENDING)
        self._on_stream = 0.0

    def seconds(self) -> float:
        """What this thread has waited so far, and the streams as far as they have come."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._on_stream += float(begin.elapsed_time(end)) / 1e3
        return self._by_thread[threading.get_ident()] + self._on_stream

    def add(self, seconds: float) -> None:
        """This thread was blocked for so long."""
        self._by_thread[threading.get_ident()] += seconds

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Around a wait that makes the current stream of the current device wait."""
        begin, end = self._event(), self._event()
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))
