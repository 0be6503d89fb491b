"""Messages between the harness and the ranks of a system: one JSON object a line over a unix socket. No torch.

A rank connects to the address in its environment, says who it is, and then sleeps in `recv` until it is asked.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

ADDRESS = "SHARDWISE_BENCH_SOCKET"
Message = dict[str, Any]


class Line:
    """A connected socket that carries messages. Not for two threads."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def send(self, message: Message) -> None:
        """Send one message. Raises OSError when the other side is gone."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None when the other side has closed. Raises TimeoutError after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            self.connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
            try:
                part = self.connection.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not part:
                return None
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\n")
        message: Message = json.loads(first)
        return message

    def close(self) -> None:
        self.connection.close()


def connect(address: str | None = None) -> Line:
    """Connect to the harness. Raises OSError when there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address or os.environ[ADDRESS])
    return Line(connection)


def serve(
    step: Callable[[], float],
    *,
    rank: int,
    world: int,
    checksum: Callable[[], float] = lambda: 0.0,
    evaluate: Callable[[], float] = lambda: math.nan,
    tell: Callable[[], Message] = dict,
    facts: Message | None = None,
    line: Line | None = None,
    together: Callable[[int], bool] = lambda steps: True,
) -> None:
    """Answer the harness until it says stop or goes away.

    `step()` does one whole step and returns its loss (of this rank, or of all); each call is timed by itself.
    `checksum()` sums what the steps left behind, `evaluate()` is the held-out loss, `tell()` what
    there is to say by then. `facts` go into the first message. `together(steps)` is asked after so many steps in all,
    and until it is true more steps are done, which then need not be done for the next command.
    """
    line = line or connect()
    asked, done = 0, deque[tuple[float, float]]()
    line.send({"rank": rank, "world": world, "pid": os.getpid(), **(facts or {})})
    while (command := line.receive()) is not None:
        if command["do"] == "run":
            asked += command["steps"]
            while len(done) < command["steps"] or not together(asked):
                done.append(_timed(step))
            taken = [done.popleft() for _ in range(command["steps"])]
            line.send({"seconds": [seconds for seconds, _ in taken], "losses": [loss for _, loss in taken]})
        elif command["do"] == "checksum":
            line.send({"checksum": checksum()})
        elif command["do"] == "evaluate":
            line.send({"loss": evaluate()})
        elif command["do"] == "tell":
            line.send(tell())
        else:
            break
    line.close()


def _timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    before = time.perf_counter()
    loss = step()
    return time.perf_counter() - before, loss
