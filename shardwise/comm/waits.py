"""`Waits`: how long callers waited for the operations of a group, whoever started them and for whatever."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from shardwise.comm.group import Group
    from shardwise.comm.timeline import Timeline

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
        self.timeline: Timeline | None = None  # where waits are recorded while one is

    def seconds(self) -> float:
        """What this thread has waited so far, and the streams as far as they have come."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._on_stream += float(begin.elapsed_time(end)) / 1e3
        return self._by_thread[threading.get_ident()] + self._on_stream

    def add(self, seconds: float) -> None:
        """This thread was blocked for so long."""
        self._by_thread[threading.get_ident()] += seconds

    def ended(self, group: Group, sequence: int, began: float) -> None:
        """This thread has waited since `began` for operation number `sequence` of a group."""
        now = time.perf_counter()
        self.add(now - began)
        if self.timeline is not None:
            self.timeline.waited(group, sequence, began, now)

    @contextlib.contextmanager
    def on_stream(self, group: Group | None = None, sequence: int = 0) -> Iterator[None]:
        """Around a wait that makes the current stream of the current device wait."""
        begin, end = self._event(), self._event()
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))
        if self.timeline is not None and group is not None:
            self.timeline.waited(group, sequence, begin, end)
