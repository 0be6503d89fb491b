"""Messages between the harness and the ranks of a system: one JSON object a line over a unix socket. No torch.

A rank connects to the address in its environment, says who it is, and then sleeps in `recv` until it is asked.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
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
) -> None:
    """Answer the harness until it says stop or goes away.

    `step()` does one whole step and returns its loss (of this rank, or of all); each call is timed by itself.
    `checksum()` sums what the steps left behind, `evaluate()` is the held-out loss, `tell()` what
    there is to say by then. `facts` go into the first message.
    """
    line = line or connect()
    line.send({"rank": rank, "world": world, "pid": os.getpid(), **(facts or {})})
    while (command := line.receive()) is not None:
        if command["do"] == "run":
            line.send(_timed(step, command["steps"]))
        elif command["do"] == "checksum":
            line.send({"checksum": checksum()})
        elif command["do"] == "evaluate":
            line.send({"loss": evaluate()})
        elif command["do"] == "tell":
            line.send(tell())
        else:
            break
    line.close()


def _timed(step: Callable[[], float], steps: int) -> Message:
    seconds, losses = [], []
    before = time.perf_counter()
    for _ in range(steps):
        losses.append(step())
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return {"seconds": seconds, "losses": losses}
