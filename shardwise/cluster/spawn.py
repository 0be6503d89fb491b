"""Processes started afresh, where forking is not safe: the same interface as the zygote, slower to be ready."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardwise.cluster.process import Exit, Process, request, wait_for
from shardwise.errors import ClusterError

_ROOT = str(Path(__file__).resolve().parents[2])
_CODE = "import sys; sys.path.insert(0, {root!r}); from shardwise.cluster.spawned import main; main()"
_POLL_S = 0.02
_CLOSE_LIMIT_S = 10.0


class Spawner:
    """A Starter whose processes are new interpreters; each dies with this process because it watches its input."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._exits: list[Exit] = []

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
        """See `Starter.fork`."""
        names = dict(fds or {})
        message = request(
            entry, args, env=env, threads=threads, stdout=stdout, fd_names=list(names), error_file=error_file
        )
        message |= {"fds": list(names.values()), "parent": os.getpid()}
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE.format(root=_ROOT)],
                stdin=subprocess.PIPE,
                pass_fds=list(names.values()),
                process_group=0,
            )
        except OSError as error:
            raise ClusterError(f"cannot start {sys.executable or 'Python'}: {error}.") from None
        self._processes[process.pid] = process
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; `wait` tells how
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        return Process(process.pid)

    def wait(self, timeout_s: float) -> list[Exit]:
        """See `Starter.wait`."""
        limit = time.monotonic() + timeout_s
        while True:
            ended = list(self._exits)
            self._exits.clear()  # in place: `wait_for` keeps others' ends in it
            for pid in list(self._processes):
                status = self._ended(pid)
                if status is not None:
                    ended.append(Exit(pid, status))
                    self._forget(pid)
            left = limit - time.monotonic()
            if ended or left <= 0:
                return ended
            time.sleep(min(_POLL_S, left))

    def wait_for(self, pid: int, timeout_s: float) -> int:
        """See `Starter.wait_for`."""
        return wait_for(self, pid, timeout_s, self._exits)

    def signal(self, pid: int, number: int) -> None:
        """See `Starter.signal`."""
        if pid in self._processes:
            self._processes[pid].send_signal(number)

    def close(self) -> None:
        """See `Starter.close`."""
        for process in self._processes.values():
            process.kill()
        for pid in list(self._processes):
            self._processes[pid].wait(_CLOSE_LIMIT_S)
            self._forget(pid)

    def _ended(self, pid: int) -> int | None:
        """The exit status if the process has ended; what is left of its group is killed too."""
        status = self._processes[pid].poll()
        if status is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        return status

    def _forget(self, pid: int) -> None:
        process = self._processes.pop(pid)
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
