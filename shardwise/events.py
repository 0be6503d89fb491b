"""`emit(name, **fields)`: the only way a room reports what happened. Sinks are added by whoever runs the job."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwise.errors import RunError

Event = dict[str, Any]
Sink = Callable[[Event], None]

_sinks: list[Sink] = []


def emit(name: str, **fields: Any) -> None:
    """Hand `{"t": wall seconds, "event": name, **fields}` to every sink; free when there is none."""
    if _sinks:
        event = {"t": time.time(), "event": name, **fields}
        for sink in tuple(_sinks):
            sink(event)


@contextmanager
def sink(target: Sink) -> Iterator[Sink]:
    """Let `target` receive every event emitted inside the `with` block."""
    _sinks.append(target)
    try:
        yield target
    finally:
        _sinks.remove(target)


class JsonLines:
    """A sink that appends one JSON line an event, in one write, so that a reader never sees half a line of ours."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the sink
        except OSError as error:
            raise RunError(f"cannot open {self.path}: {error.strerror}. Check the run folder's permissions.") from None

    def __call__(self, event: Event) -> None:
        try:
            line = (json.dumps(event, default=str) + "\n").encode()
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}. Free some space and resume the run.") from None

    def close(self) -> None:
        self._file.close()


def read(path: str | os.PathLike[str]) -> list[Event]:
    """All whole lines of an events file; a last line cut short by a crash is left out."""
    found: list[Event] = []
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return found
    for line in raw.split(b"\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
