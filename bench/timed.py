"""A rank that times one operation on request; shared by systems that know torch and those that do not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.line import Message, connect


class Made(NamedTuple):
    """An operation that is ready: the call, what fills its tensors anew, and whether they hold its result."""

    call: Callable[[], Any]
    fill: Callable[[], Any]
    right: Callable[[], bool]


def serve(rank: int, world: int, make: Callable[[str, int], Made]) -> None:
    """Answer `{"do": "time", "operation", "bytes", "repeats"}` until the harness says stop or goes away."""
    line = connect()
    line.send({"rank": rank, "world": world, "pid": os.getpid()})
    made: dict[tuple[str, int], Made] = {}
    while (command := line.receive()) is not None and command["do"] == "time":
        key = command["operation"], command["bytes"]
        if key not in made:
            made = {key: make(*key)}
        line.send(measure(made[key], command["repeats"]))
    line.close()


def measure(made: Made, repeats: int) -> Message:
    """One call to check the result, three that are not counted, then seconds a call and the 99th percentile."""
    made.fill()
    made.call()
    right = made.right()
    for _ in range(3):
        made.call()
    made.fill()
    made.call()
    each = []
    before = began = time.perf_counter()
    for _ in range(repeats):
        made.call()
        now = time.perf_counter()
        each.append(now - before)
        before = now
    each.sort()
    return {
        "seconds": (before - began) / repeats,
        "p99": each[min(len(each) - 1, int(len(each) * 0.99))],
        "right": right,
    }
