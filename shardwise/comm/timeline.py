"""`Timeline`: what this rank did in a step, and when. Off but for the few steps that a run records."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from shardwise.comm.group import Group

MOST = 4096  # spans, operations and waits of a step that are kept, of each
NO_PEER = -1


class Clock(Protocol):
    """Marks moments. A mark costs little; what it was in seconds is asked for when the step is over."""

    def mark(self) -> Any: ...

    def seconds(self, mark: Any) -> float:
        """Of the host's monotonic clock, which all processes of a host share."""
        ...


class HostClock:
    """`time.perf_counter`."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


class StreamClock:
    """Where the current CUDA stream is when it gets there: the host runs ahead of the device, so its time says little.

    Made in the moment that all marks are measured from; `event` makes a CUDA event.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._first = self.mark()
        self._first.synchronize()
        self._began = time.perf_counter()

    def mark(self) -> Any:
        event = self._event()
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        if isinstance(mark, float):  # of a wait for host memory, which the host itself has waited
            return mark
        mark.synchronize()
        return self._began + float(self._first.elapsed_time(mark)) / 1e3


class Operation(NamedTuple):
    """An operation of a group as this rank began it; `peer` is the other rank of a message."""

    group: int
    op: str
    peer: int
    began: Any


class _Span:
    """One span of a timeline, as a context."""

    __slots__ = ("_began", "_timeline", "_what")

    def __init__(self, timeline: Timeline, what: tuple[str, int, int]) -> None:
        self._timeline, self._what = timeline, what

    def __enter__(self) -> None:
        self._began = self._timeline.clock.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        timeline = self._timeline
        timeline.keep(timeline.spans, (*self._what, self._began, timeline.clock.mark()))


OFF = contextlib.nullcontext()


class Timeline:
    """The spans of this rank's own thread, the operations that it began, and its waits for them, in one step at a time.

    `span` may be called at any time and costs next to nothing outside of `recording`.
    """

    def __init__(self) -> None:
        self.on = False
        self.clock: Clock = HostClock()
        self._clear()

    def _clear(self) -> None:
        self.spans: list[Any] = []
        self._operations: list[Operation] = []
        self._waits: list[tuple[int, Any, Any]] = []
        self._groups: list[Group] = []
        self._numbers: dict[tuple[int, int], int] = {}  # of (group, sequence): the operation's place in the list
        self._dropped = 0

    def span(self, kind: str, stage: int = 0, micro: int = 0) -> contextlib.AbstractContextManager[None]:
        """Around what is recorded as `kind` ("forward", "backward", "weights" or "optimizer")."""
        return _Span(self, (kind, stage, micro)) if self.on else OFF

    @contextlib.contextmanager
    def recording(self, groups: Sequence[Group], clock: Clock) -> Iterator[Callable[[], dict[str, Any]]]:
        """Record what this thread does in the block, and what it exchanges in `groups`; the function that is given
        says it after the block, as `told` does."""
        self._clear()
        self.clock, self._groups, self._thread = clock, list(groups), threading.get_ident()
        for group in groups:
            group.waits.timeline = self
        began = clock.mark()
        ended: list[Any] = []
        self.on = True
        try:
            yield lambda: self._told(began, ended[0])
        finally:
            self.on = False
            ended.append(clock.mark())
            for group in groups:
                group.waits.timeline = None

    def keep(self, kept: list[Any], one: Any) -> None:
        """Add to a list that has an end."""
        if len(kept) < MOST:
            kept.append(one)
        else:
            self._dropped += 1

    def began(self, group: Group, op: str, sequence: int, peer: int | None) -> None:
        """An operation of a group begins now."""
        if not self._mine(at_once=isinstance(self.clock, HostClock)) or group not in self._groups:
            return
        number = self._groups.index(group)
        if len(self._operations) < MOST:
            self._numbers[number, sequence] = len(self._operations)
        whom = NO_PEER if peer is None else group.ranks[peer]
        self.keep(self._operations, Operation(number, op, whom, self.clock.mark()))

    def waited(self, group: Group, sequence: int, began: Any, ended: Any) -> None:
        """A wait for an operation lasted from one mark to the other. One that began before the recording is unknown."""
        if self._mine(at_once=isinstance(began, float)):
            number = self._numbers.get((self._groups.index(group), sequence), -1) if group in self._groups else -1
            self.keep(self._waits, (number, began, ended))

    def _mine(self, *, at_once: bool) -> bool:
        """Threads that serve others wait all the time; what is not `at_once`, on a CUDA stream, is backward's too."""
        return self.on and (threading.get_ident() == self._thread or not at_once)

    def _told(self, began: Any, ended: Any) -> dict[str, Any]:
        """What was recorded, as an event has it: `start` on the host's monotonic clock and `seconds`; then, in
        microseconds since `start`, spans as [kind, stage, microbatch, at, for], operations as [group, name, peer, at]
        and waits as [operation, at, for]; and how many of these there was no room for."""
        first = self.clock.seconds(began)

        def at(mark: Any) -> int:
            return round(1e6 * (self.clock.seconds(mark) - first))

        return {
            "start": first,
            "seconds": self.clock.seconds(ended) - first,
            "groups": [{"axis": group.getGroupDesc(), "ranks": list(group.ranks)} for group in self._groups],
            "spans": [[*what, at(a), at(b) - at(a)] for *what, a, b in self.spans],
            "operations": [[one.group, one.op, one.peer, at(one.began)] for one in self._operations],
            "waits": [[number, at(a), at(b) - at(a)] for number, a, b in self._waits],
            "dropped": self._dropped,
        }
