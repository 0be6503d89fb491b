"""Which steps of a run have their timeline recorded, and the event that a rank says it in."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from shardwise import events
from shardwise.comm.mesh import Mesh

WARM_UP, RECORDED = 2, 3


def recorded_steps(first: int, last: int) -> frozenset[int]:
    """Of the steps numbered `first` (1-based) to `last`: three after two that warm up, and two in the middle.

    Fewer where there are fewer; the last step if there is no other. The rest of a run pays nothing.
    """
    early = range(first + WARM_UP, first + WARM_UP + RECORDED)
    middle = first + (last - first + 1) // 2
    found = {step for step in (*early, middle, middle + 1) if first + WARM_UP <= step <= last}
    return frozenset(found or {last})


@contextlib.contextmanager
def timed(mesh: Mesh, step: int, *, wanted: bool) -> Iterator[None]:
    """Record what this rank does in the block, if that is `wanted`, and emit it; of a step that fails nothing."""
    if not wanted:
        yield
        return
    with mesh.recording() as told:
        yield
    events.emit("timeline", step=step, rank=mesh.rank, host=host(), **told())


def host() -> str:
    """What tells this host from others, and one start of it from the next: their monotonic clocks differ."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()
