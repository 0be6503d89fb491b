"""When to end the ranks of a run: a pure decision from exits, stop signals and the time."""

from __future__ import annotations

from typing import Literal

Action = Literal["none", "terminate", "kill", "give_up"]

SETTLE_S = 0.2  # the peers of a failed rank get this long to say what they saw, before they are told to stop
KILL_LIMIT_S = 15.0


class Supervision:
    """Which ranks live, and what to do about the others' ends. Times are seconds on any one monotonic clock."""

    def __init__(self, ranks: int, grace_s: float) -> None:
        self.live = set(range(ranks))
        self.terminated: set[int] = set()
        self.stop_signal: int | None = None
        self._grace_s = grace_s
        self._stops = 0
        self._failed_at: float | None = None
        self._terminated_at: float | None = None
        self._killed_at: float | None = None

    def exited(self, rank: int, status: int, now: float) -> None:
        """A rank ended; a status other than 0 ends all ranks."""
        self.live.discard(rank)
        if status != 0 and self._failed_at is None:
            self._failed_at = now

    def stop(self, signal: int) -> None:
        """The user or the system asks to stop: the first time in order, the second time at once."""
        self._stops += 1
        if self.stop_signal is None:
            self.stop_signal = signal

    def decide(self, now: float) -> Action:
        """What to do to every live rank now; each of the actions comes once, in the order of `Action`."""
        if not self.live:
            return "none"
        if self._killed_at is not None:
            return "give_up" if now - self._killed_at >= KILL_LIMIT_S else "none"
        if self._stops > 1 or (self._terminated_at is not None and now - self._terminated_at >= self._grace_s):
            self._killed_at = now
            self.terminated |= self.live
            return "kill"
        if self._terminated_at is None and self._due(now):
            self._terminated_at = now
            self.terminated |= self.live
            return "terminate"
        return "none"

    def _due(self, now: float) -> bool:
        return self._stops > 0 or (self._failed_at is not None and now - self._failed_at >= SETTLE_S)
