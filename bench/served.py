"""A callback of a shardwise job that lets the harness ask for its steps. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from bench.line import Line, Message, connect


class Served:
    """Called after every step: counts it, and between two turns sleeps until the harness asks for more.

    The training loop cannot stand still before its first step, so that step counts as part of the first turn, and its
    seconds are 0. From then on a step's seconds are those from one call to the next: all that the loop does.
    `tell(state)` is what the job has to say by then, of the state of training.
    """

    def __init__(
        self,
        checksum: Callable[[], float],
        connect_to: Callable[[], Line] = connect,
        tell: Callable[[Any], Message] = lambda state: {},
    ) -> None:
        self.checksum = checksum
        self.tell = tell
        self.connect_to = connect_to
        self._line: Line | None = None
        self._asked = 0
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._began = 0.0

    def __call__(self, state: Any, result: Any) -> None:
        self._seconds.append(time.perf_counter() - self._began if self._began else 0.0)
        self._losses.append(result.loss)
        if self._line is None:
            self._line = self.connect_to()
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            self._line.send({"rank": rank, "world": world, "pid": os.getpid()})
        if len(self._losses) >= self._asked:
            self._between_turns(self._line, state)
        self._began = time.perf_counter()

    def _between_turns(self, line: Line, state: Any) -> None:
        if self._asked:
            self._answer(line)
        while (command := line.receive()) is not None:
            if command["do"] == "run":
                self._asked = command["steps"]
                if len(self._losses) < self._asked:
                    return
                self._answer(line)
            elif command["do"] == "checksum":
                line.send({"checksum": self.checksum()})
            elif command["do"] == "tell":
                line.send(self.tell(state))
            else:
                break
        os._exit(0)  # the run is over when the harness says so, whatever is left of its steps

    def _answer(self, line: Line) -> None:
        line.send({"seconds": self._seconds, "losses": self._losses})
        self._seconds, self._losses, self._asked = [], [], 0
