"""Processes on this machine: the client of a zygote, or of plain subprocesses where forking is not safe."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from shardwise.cluster import zygote as wire
from shardwise.cluster.process import START_LIMIT_S, Exit, Process, Starter, request, wait_for
from shardwise.cluster.ranks import RankExits, run_ranks
from shardwise.errors import ClusterError

PRELOAD = ("torch", "torch.distributed", "numpy", "safetensors.torch")
_FRAME_LIMIT_S = 30.0
_CLOSE_LIMIT_S = 10.0
_ROOT = str(Path(__file__).resolve().parents[2])

Method = Literal["fork", "spawn"]


def method_here() -> Method:
    """`fork` on Linux; `spawn` where system libraries do not survive a fork (macOS). Raises ClusterError on Windows."""
    if sys.platform == "win32":
        raise ClusterError("Shardwise starts no processes on Windows itself. Install WSL2 and run it in there.")
    return "fork" if sys.platform == "linux" else "spawn"


class Zygote:
    """Starts ranks by forking a process that has imported `preload` already: a rank is there after milliseconds."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self._process = process
        self._channel = channel
        self._exits: list[Exit] = []
        self._live: set[int] = set()
        self._failure = ""
        self.ready_s: float | None = None

    @staticmethod
    def start(preload: Sequence[str] = PRELOAD, *, method: Method | None = None) -> Starter:
        """Begin now: returns at once, and the zygote imports `preload` while the caller goes on.

        `method` None takes what this platform allows. A module that cannot be imported is reported by the first
        `fork`. Raises ClusterError.
        """
        if (method or method_here()) == "spawn":
            from shardwise.cluster.spawn import Spawner

            return Spawner()
        if not sys.executable:
            raise ClusterError(
                "sys.executable is empty, so no Python can be started. Run Shardwise from a normal Python."
            )
        ours, theirs = socket.socketpair()
        # -P and the explicit path: a file named random.py in the working directory must not shadow the library.
        fd = theirs.fileno()
        code = f"import sys; sys.path.insert(0, {_ROOT!r}); from shardwise.cluster.zygote import main; main({fd})"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(fd,),
                start_new_session=True,
            )
        started = Zygote(process, ours)
        started._send({"path": sys.path, "preload": list(preload), "parent": os.getpid()})
        return started

    @property
    def pid(self) -> int:
        return self._process.pid

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
        """See `Starter.fork`. Waits for the zygote's imports."""
        names = dict(fds or {})
        message = request(
            entry, args, env=env, threads=threads, stdout=stdout, fd_names=list(names), error_file=error_file
        )
        self.wait_ready()
        self._send(message, list(names.values()))
        limit = time.monotonic() + _FRAME_LIMIT_S
        while True:
            reply = self._next(limit - time.monotonic())
            if reply is None:
                raise ClusterError(
                    f"the zygote (pid {self.pid}) did not fork within {_FRAME_LIMIT_S:.0f} s. Is it stopped?"
                )
            if reply["event"] == "refused":
                raise ClusterError(f"cannot start a rank: {reply['why']}.")
            if reply["event"] == "forked":
                self._live.add(reply["pid"])
                return Process(reply["pid"])

    def wait_ready(self, timeout_s: float = START_LIMIT_S) -> None:
        """Wait for the imports; `ready_s` then holds how long they took. Raises ClusterError where one failed."""
        limit = time.monotonic() + timeout_s
        while self.ready_s is None:
            if self._next(limit - time.monotonic()) is None:
                raise ClusterError(f"the zygote (pid {self.pid}) did not finish its imports within {timeout_s:.0f} s.")
        if self._failure:
            raise ClusterError(f"cannot start ranks: {self._failure}. Install or repair that package.")

    def wait(self, timeout_s: float) -> list[Exit]:
        """See `Starter.wait`."""
        limit = time.monotonic() + timeout_s
        while self._next(0.0) is not None:
            continue
        while not self._exits and (left := limit - time.monotonic()) > 0:
            self._next(left)
        ended = list(self._exits)
        self._exits.clear()  # in place: `wait_for` keeps others' ends in it
        return ended

    def wait_for(self, pid: int, timeout_s: float) -> int:
        """See `Starter.wait_for`."""
        return wait_for(self, pid, timeout_s, self._exits)

    def signal(self, pid: int, number: int) -> None:
        """See `Starter.signal`. The zygote sends it: it alone knows that the number has not been given to another."""
        self._send({"op": "signal", "pid": pid, "signal": number})

    def close(self) -> None:
        """See `Starter.close`. The zygote kills its processes when the socket closes."""
        self._channel.close()
        try:
            self._process.wait(_CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_CLOSE_LIMIT_S)

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        self._channel.settimeout(START_LIMIT_S)
        try:
            wire.send(self._channel, message, fds)
        except TimeoutError:
            raise ClusterError(f"the zygote (pid {self.pid}) reads no requests. Is it stopped?") from None
        except OSError:
            raise self._died() from None

    def _next(self, timeout_s: float) -> dict[str, Any] | None:
        """The next frame within `timeout_s`, else None; what an exit or the imports' end says is kept as well."""
        if not select.select([self._channel], [], [], max(0.0, timeout_s))[0]:
            return None
        self._channel.settimeout(_FRAME_LIMIT_S)
        frame, _ = wire.receive(self._channel)
        if frame is None:
            raise self._died()
        if frame["event"] == "exit":
            self._live.discard(frame["pid"])
            self._exits.append(Exit(frame["pid"], frame["status"]))
        elif frame["event"] == "ready":
            self.ready_s, self._failure = frame["seconds"], frame["failure"]
        return frame

    def _died(self) -> ClusterError:
        for pid in self._live:  # the kernel has killed the ranks; this takes the workers that they had started
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self._live.clear()
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0)
            how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            return ClusterError(
                f"the zygote (pid {self.pid}) ended {how}, and its ranks with it. If nobody killed it, "
                "look in the kernel's log for a lack of memory, and start the command again."
            )
        return ClusterError(f"the zygote (pid {self.pid}) closed its connection. Start the command again.")


class LocalLauncher:
    """Ranks as processes of this host."""

    def __init__(self, starter: Starter) -> None:
        self.starter = starter

    @staticmethod
    def start(preload: Sequence[str] = PRELOAD, *, method: Method | None = None) -> LocalLauncher:
        """See `Zygote.start`."""
        return LocalLauncher(Zygote.start(preload, method=method))

    def run(
        self,
        entry: str,
        args_of_rank: Callable[[int], Mapping[str, Any]],
        ranks: int,
        *,
        logs: Path,
        on_poll: Callable[[], None] = lambda: None,
        grace_s: float = 5.0,
    ) -> RankExits:
        """See `Launcher.run` and `run_ranks`."""
        return run_ranks(self.starter, entry, args_of_rank, ranks, logs=logs, on_poll=on_poll, grace_s=grace_s)

    def close(self) -> None:
        """See `Launcher.close`."""
        self.starter.close()
