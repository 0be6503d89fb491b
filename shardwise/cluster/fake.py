"""A launcher for tests: it records what it would start, and plays the ends that a script gives."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from shardwise.cluster.process import Exit, Process, wait_for
from shardwise.cluster.ranks import RankExits, run_ranks


class Started(Struct, frozen=True, kw_only=True):
    """One recorded `fork`."""

    pid: int
    entry: str
    args: dict[str, Any]
    env: dict[str, str]
    threads: int


class Script(Struct, frozen=True, kw_only=True):
    """How the next process ends: by itself at `at_s` (None: never) with `status`; which signals it ignores."""

    at_s: float | None = 0.0
    status: int = 0
    ignores: tuple[int, ...] = ()


class FakeStarter:
    """A Starter without processes and without time: `wait` moves its clock, and nothing ever sleeps."""

    def __init__(self, scripts: Sequence[Script] = ()) -> None:
        self.started: list[Started] = []
        self.signals: list[tuple[float, int, int]] = []
        self.now = 0.0
        self.closed = False
        self._scripts = list(scripts)
        self._ends: dict[int, tuple[float, int]] = {}
        self._ignores: dict[int, tuple[int, ...]] = {}
        self._exits: list[Exit] = []

    def clock(self) -> float:
        return self.now

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
        """Record it; the process gets the next script, or ends well at once where there is none left."""
        pid = len(self.started) + 1
        script = self._scripts.pop(0) if self._scripts else Script()
        args = {**args, **(fds or {})}
        self.started.append(Started(pid=pid, entry=entry, args=args, env=dict(env), threads=threads))
        self._ends[pid] = (float("inf") if script.at_s is None else script.at_s, script.status)
        self._ignores[pid] = script.ignores
        return Process(pid)

    def wait(self, timeout_s: float) -> list[Exit]:
        """See `Starter.wait`: moves the clock to the next end, or by `timeout_s`."""
        if self._exits:
            kept = list(self._exits)
            self._exits.clear()
            return kept
        until = min([self.now + timeout_s, *(at for at, _ in self._ends.values())])
        self.now = max(self.now, until)
        ended = [Exit(pid, status) for pid, (at, status) in self._ends.items() if at <= self.now]
        for pid, _ in ended:
            del self._ends[pid]
        return ended

    def wait_for(self, pid: int, timeout_s: float) -> int:
        """See `Starter.wait_for`; the limit is real time, so script an end for `pid`."""
        return wait_for(self, pid, timeout_s, self._exits)

    def signal(self, pid: int, number: int) -> None:
        """See `Starter.signal`: a process ends by it at once unless its script ignores it."""
        self.signals.append((self.now, pid, int(number)))
        if pid in self._ends and number not in self._ignores[pid]:
            self._ends[pid] = (self.now, -int(number))

    def close(self) -> None:
        """See `Starter.close`."""
        for pid in list(self._ends):
            self.signal(pid, signal.SIGKILL)
        self.closed = True


class FakeLauncher:
    """A Launcher over a FakeStarter."""

    def __init__(self, scripts: Sequence[Script] = ()) -> None:
        self.starter = FakeStarter(scripts)

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
        """See `Launcher.run`."""
        return run_ranks(
            self.starter,
            entry,
            args_of_rank,
            ranks,
            logs=logs,
            on_poll=on_poll,
            grace_s=grace_s,
            clock=self.starter.clock,
        )

    def close(self) -> None:
        """See `Launcher.close`."""
        self.starter.close()
