"""What the groups of a mesh exchanged: messages and bytes by operation, and what of it went over a wire."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any

_TCP_INFO_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info, since 4.19: a u64


def least_sent(operation: str, nbytes: int, ranks: int) -> int:
    """Bytes that a rank sends, averaged over the `ranks`, when none sends more than it must. An estimate.

    `nbytes` are those handed to the group: the whole tensor, of `all_gather`, `gather` and `scatter` this rank's piece.
    The least is what a ring sends (Chan et al. 2007, table 1; Patarasuk and Yuan 2009 for all-reduce).
    """
    others = ranks - 1
    if operation.startswith("all_reduce"):
        return 2 * nbytes * others // ranks
    if operation.startswith("all_gather"):
        return nbytes * others
    if operation.startswith(("reduce", "broadcast", "gather", "scatter", "all_to_all")):
        return nbytes * others // ranks
    return nbytes if operation == "send" else 0


class TcpSent:
    """Bytes that the kernel sent on connections, given as `(descriptor, inode)`; repetitions count too.

    Called, it asks again; of a connection that has ended since it remembers the last answer. None where the kernel
    does not tell (before Linux 4.19, or elsewhere).
    """

    def __init__(self, sockets: Iterable[tuple[int, int]]) -> None:
        self._sent = dict.fromkeys(sockets, 0)

    def __call__(self) -> int | None:
        if sys.platform != "linux":
            return None
        for descriptor, inode in self._sent:
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino != inode:
                    continue
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(raw) < _TCP_INFO_SENT + 8:
                    return None
                self._sent[descriptor, inode] = struct.unpack_from("Q", raw, _TCP_INFO_SENT)[0]
        return sum(self._sent.values())


def described(group: Any) -> dict[str, Any]:
    """What a `Group` exchanged on this rank, as an event tells it.

    `sent` of an operation is an estimate (`least_sent`): 0 over shared memory, None where only a part of the bytes
    leaves the host. `counted` is what the kernel sent on the group's connections, None where nobody counts.
    """
    known = {"shm": lambda *_: 0, "shm-torch": lambda *_: 0, "hierarchical": lambda *_: None}
    estimate = known.get(group.transport, least_sent)
    operations = {
        name: {"messages": messages, "bytes": moved, "sent": estimate(name, moved, group.size())}
        for name, (messages, moved) in sorted(group.wire.items())
    }
    return {
        "axis": group.getGroupDesc(),
        "ranks": group.size(),
        "backend": group.transport,
        "operations": operations,
        "counted": group.sent(),
    }
