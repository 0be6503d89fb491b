"""Processes that a benchmark starts, and that are all ended when it is done, whatever they did."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "SHARDWISE_BENCH_TOKEN"


class Launched:
    """`command` in a session of its own, in the working directory `folder`, its output in a log.

    Every process that inherits the environment carries a token, so that `close` finds those that left the group.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], folder: str | Path = ROOT) -> None:
        self.command = list(command)
        self.env = dict(env)
        self.folder = Path(folder)
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-")
        self.log = Path(self.scratch.name) / "log"
        self._token = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command. Raises OSError when it cannot be executed."""
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=environment() | self.env | {TOKEN: self._token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def status(self) -> int | None:
        """The exit status of the command, None while it runs."""
        return self._process.poll() if self._process else None

    def gone(self) -> bool:
        """Whether the command and everything that it started have ended."""
        return self.status is not None and not _carrying(self._token)

    def pids(self) -> list[int]:
        """Every process of it that is alive now."""
        own = [self._process.pid] if self._process and self.status is None else []
        return sorted({*own, *_carrying(self._token)})

    def freeze(self) -> None:
        """Stop every process of it where it stands: it uses no core until `thaw`."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let every process of it go on."""
        self._signal_all(signal.SIGCONT)

    def wait(self, limit_s: float) -> bool:
        """Wait for the command to end; False when it is still there after `limit_s`."""
        assert self._process is not None
        _sleep_until_end(self._process, limit_s)
        try:
            self._process.wait(0.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self, grace_s: float = 15.0) -> None:
        """Give the command `grace_s` to end by itself, then kill whatever is left. May be called twice."""
        if self._process is not None:
            self.thaw()
            if not self.wait(grace_s):
                _signal_group(self._process.pid, signal.SIGTERM)
                self.wait(3.0)
            _signal_group(self._process.pid, signal.SIGKILL)
            _sweep(self._token)
            self._process.wait()
            self._process = None
        self.scratch.cleanup()

    def tail(self, characters: int = 400) -> str:
        """The end of what it printed, in one line."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return " ".join(text.split())[-characters:]

    def _signal_all(self, number: int) -> None:
        if self._process is not None:
            _signal_group(self._process.pid, number)
            for pid in _carrying(self._token):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


def environment() -> dict[str, str]:
    """What every system gets: one thread a rank, loopback, this checkout on the path, and nothing that phones home."""
    env = dict(os.environ)
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if Path("/sys/class/net/lo").exists():
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def _sleep_until_end(process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Wake at the moment of the end (Linux); `Popen.wait` with a limit looks every 50 ms, too rarely to time by."""
    if process.poll() is None and limit_s > 0:
        if not hasattr(os, "pidfd_open"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
            return
        handle = os.pidfd_open(process.pid)
        try:
            select.select([handle], [], [], limit_s)
        finally:
            os.close(handle)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _carrying(token: str) -> list[int]:
    """Processes whose environment has the token (Linux; elsewhere the process group is all there is)."""
    marker = f"{TOKEN}={token}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _sweep(token: str, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while (left := _carrying(token)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
