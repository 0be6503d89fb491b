"""What every way of starting processes offers: `Starter`, the processes it starts and how they end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shardwise.errors import ClusterError

START_LIMIT_S = 120.0  # importing torch takes one or two seconds on an idle machine; a loaded one may need a minute


class Exit(NamedTuple):
    """How a process ended: `status` is its exit code, or minus the number of the signal that ended it."""

    pid: int
    status: int


class Process(NamedTuple):
    """A process that a Starter started and still watches."""

    pid: int


class Starter(Protocol):
    """Starts processes that call one function each, and reports their ends. Used from one thread."""

    def fork(
        self,
        entry: str,
        args: Mapping[str, Any],
        *,
        env: Mapping[str, str],
        threads: int,
        stdout: Path | None,
        fds: Mapping[str, int] | None = None,
        error_file: Path | None = None,
    ) -> Process:
        """Call `entry` ("package.module:function") as `function(**args)` in a new process.

        `args` must be JSON-serialisable. Each of `fds` is duplicated into the process and its number there handed
        over as the keyword argument of that name. `env` is laid over the caller's environment; `threads` is the
        number of intra-op threads; `stdout` (None: inherited) receives standard output and standard error;
        `error_file` receives an exception that nobody caught, as JSON. Raises ClusterError.
        """
        ...

    def wait(self, timeout_s: float) -> list[Exit]:
        """The processes that ended since the last call; waits at most `timeout_s` seconds for the first."""
        ...

    def wait_for(self, pid: int, timeout_s: float) -> int:
        """The exit status of one process; others' ends are kept for `wait`. Raises ClusterError after `timeout_s`."""
        ...

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process of this Starter; no effect on one that has ended."""
        ...

    def close(self) -> None:
        """Kill every process that still runs, and release what this holds. May be called twice."""
        ...


def wait_for(starter: Starter, pid: int, timeout_s: float, keep: list[Exit]) -> int:
    """`Starter.wait_for` in terms of `Starter.wait`: exits of other processes go to `keep`."""
    limit = time.monotonic() + timeout_s
    status: int | None = None
    others: list[Exit] = []
    while status is None and (left := limit - time.monotonic()) > 0:
        for ended in starter.wait(left):
            if ended.pid == pid:
                status = ended.status
            else:
                others.append(ended)
    keep += others
    if status is None:
        raise ClusterError(f"process {pid} has not ended within {timeout_s:.0f} s.")
    return status


def request(
    entry: str,
    args: Mapping[str, Any],
    *,
    env: Mapping[str, str],
    threads: int,
    stdout: Path | None,
    fd_names: list[str],
    error_file: Path | None,
) -> dict[str, Any]:
    """The message that `child.run` obeys. Raises ClusterError where `entry` is not a "module:function"."""
    module, colon, function = entry.partition(":")
    if not (module and colon and function):
        raise ClusterError(f"the entry '{entry}' is not a 'package.module:function'. Name a function at module level.")
    return {
        "op": "fork",
        "entry": entry,
        "args": dict(args),
        "env": {**os.environ, **env},
        "path": sys.path,
        "cwd": os.getcwd(),
        "threads": threads,
        "stdout": None if stdout is None else os.fspath(stdout),
        "fd_names": fd_names,
        "error_file": None if error_file is None else os.fspath(error_file),
    }
