"""The main function of a spawned process: its request comes on standard input, whose end means the parent's death."""

from __future__ import annotations

import json
import os
import signal
import threading

from shardwise.cluster import child


def main() -> None:
    """Read one JSON line from standard input, then do what it says; die when that input ends."""
    pipe = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(pipe, 65536)
        if not part:
            return  # the parent died while it wrote
        line += part
    request = json.loads(line)
    threading.Thread(target=_die_at_end, args=(pipe,), daemon=True).start()
    child.run(request, request["fds"], parent=request["parent"])


def _die_at_end(pipe: int) -> None:
    while os.read(pipe, 4096):
        continue
    os.killpg(os.getpid(), signal.SIGKILL)
