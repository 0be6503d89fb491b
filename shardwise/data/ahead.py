"""Run an iterator in a background thread, a bounded number of items ahead of its reader."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from shardwise.errors import DataError

T = TypeVar("T")
_POLL_S = 0.1
_JOIN_S = 10.0
BURST, BURST_BYTES = 16, 1 << 20  # at most so many items, of so many bytes together, are made one after the other


class Ahead(Generic[T]):
    """An iterator over what `source(stop)` gives, made in a thread of its own, at most `depth` items ahead.

    The thread calls `source`, so that whatever it opens (worker processes) is opened and closed by one thread; where
    it waits, it looks at the event `stop`. An
    exception there is raised here, once all items before it were read. `awaited()` names what a reader waits for.
    Where `nbytes` tells the bytes of an item, small ones are made in bursts, up to BURST ahead: a thread that wakes for
    every one of them takes more of the core than they do.
    """

    def __init__(
        self,
        source: Callable[[threading.Event], Iterator[T]],
        *,
        depth: int,
        timeout_s: float,
        awaited: Callable[[], str],
        nbytes: Callable[[T], int] | None = None,
    ) -> None:
        self._items = _Shelf(max(1, depth))
        self._stop = threading.Event()
        self._timeout_s, self._awaited = timeout_s, awaited
        self._ended = False
        # The thread holds the queue and the event, not this object: dropping the reader ends the thread.
        self._thread = threading.Thread(
            target=_fill, args=(source, self._items, self._stop, nbytes), name="shardwise-data", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        try:
            kind, item = self._items.get(self._timeout_s)
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
        self._items.clear()  # room for a put that is under way
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    def __del__(self) -> None:
        self._stop.set()


class _Shelf:
    """Entries between one writer and one reader. Full, it takes none until fewer than `depth` are left."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._entries: deque[tuple[str, Any]] = deque()
        self._changed = threading.Condition()
        self._full = False

    def put(self, entry: tuple[str, Any], nbytes: int | None, stop: threading.Event) -> bool:
        """Wait for room; False once there is none because of `stop`. An entry of `nbytes` says how many it holds."""
        most = self._depth if nbytes is None else max(self._depth, min(BURST, BURST_BYTES // max(1, nbytes)))
        with self._changed:
            while self._full and not stop.is_set():
                self._changed.wait(_POLL_S)
            if stop.is_set():
                return False
            self._entries.append(entry)
            self._full = len(self._entries) >= most
            self._changed.notify_all()
        return True

    def get(self, timeout_s: float) -> tuple[str, Any]:
        """The next entry. Raises queue.Empty."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._entries, timeout_s):
                raise queue.Empty
            entry = self._entries.popleft()
            if self._full and len(self._entries) < self._depth:
                self._full = False
                self._changed.notify_all()
            return entry

    def clear(self) -> None:
        with self._changed:
            self._entries.clear()
            self._full = False
            self._changed.notify_all()


def _fill(
    source: Callable[[threading.Event], Iterator[T]],
    items: _Shelf,
    stop: threading.Event,
    nbytes: Callable[[T], int] | None,
) -> None:
    made: Iterator[T] | None = None
    try:
        made = source(stop)
        for item in made:
            if not items.put(("item", item), nbytes(item) if nbytes else None, stop):
                return
        items.put(("end", None), None, stop)
    except BaseException as error:  # handed to the reader, whatever it is
        items.put(("error", error), None, stop)
    finally:
        close = getattr(made, "close", None)
        if close is not None:
            close()
