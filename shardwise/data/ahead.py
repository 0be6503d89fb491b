"""Run an iterator in a background thread, a bounded number of items ahead of its reader."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from shardwise.errors import DataError

T = TypeVar("T")
_POLL_S = 0.1
_JOIN_S = 10.0


class Ahead(Generic[T]):
    """An iterator over what `source(stop)` gives, made in a thread of its own, at most `depth` items ahead.

    The thread calls `source`, so that whatever it opens (worker processes) is opened and closed by one thread; where
    it waits, it looks at the event `stop`. An
    exception there is raised here, once all items before it were read. `awaited()` names what a reader waits for.
    """

    def __init__(
        self,
        source: Callable[[threading.Event], Iterator[T]],
        *,
        depth: int,
        timeout_s: float,
        awaited: Callable[[], str],
    ) -> None:
        self._items: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=max(1, depth))
        self._stop = threading.Event()
        self._timeout_s, self._awaited = timeout_s, awaited
        self._ended = False
        # The thread holds the queue and the event, not this object: dropping the reader ends the thread.
        self._thread = threading.Thread(
            target=_fill, args=(source, self._items, self._stop), name="shardwise-data", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        try:
            kind, item = self._items.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise DataError(
                f"No data came within {self._timeout_s:.0f} s while waiting for {self._awaited()}. The data set, its "
                "transform or the disk hangs; try the samples by hand, or with workers=0 to see where."
            ) from None
        if kind == "item":
            return item
        self._ended = True
        if kind == "error":
            raise item
        raise StopIteration

    def close(self) -> None:
        """End the thread and what it opened; idempotent."""
        self._ended = True
        self._stop.set()
        while True:  # room for a put that is under way
            try:
                self._items.get_nowait()
            except queue.Empty:
                break
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def __del__(self) -> None:
        self._stop.set()


def _fill(
    source: Callable[[threading.Event], Iterator[T]], items: queue.Queue[tuple[str, Any]], stop: threading.Event
) -> None:
    made: Iterator[T] | None = None
    try:
        made = source(stop)
        for item in made:
            if not _put(items, ("item", item), stop):
                return
        _put(items, ("end", None), stop)
    except BaseException as error:  # handed to the reader, whatever it is
        _put(items, ("error", error), stop)
    finally:
        close = getattr(made, "close", None)
        if close is not None:
            close()


def _put(items: queue.Queue[tuple[str, Any]], entry: tuple[str, Any], stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            items.put(entry, timeout=_POLL_S)
        except queue.Full:
            continue
        return True
    return False
