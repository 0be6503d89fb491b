"""The key-value store in which ranks find each other; it listens on loopback only."""

from __future__ import annotations

import re
import socket
from datetime import timedelta

import torch.distributed as dist

from shardwise.errors import CommError

LOOPBACK = "127.0.0.1"


def listen() -> socket.socket:
    """A listening socket on loopback at a port that the system chose; rank 0 serves the store on it."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((LOOPBACK, 0))
    listener.listen(128)
    return listener


def open_store(
    listen_fd: int | None, port: int, rank: int, world: int, timeout_s: float, *, host: str = LOOPBACK
) -> dist.TCPStore:
    """The store of one run: rank 0 serves it on `listen_fd`, everybody (rank 0 too) connects to `host`:`port`.

    `listen_fd` is a listening socket that the store takes over (torch's own would listen on every address, even
    when told loopback). Raises CommError when nobody answers within `timeout_s` seconds.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        if listen_fd is None:
            return dist.TCPStore(host, port, world, is_master=False, timeout=limit)
        return dist.TCPStore(
            host, port, world, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listen_fd
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"rank {rank} of {world} could not open the store at {host}:{port} within {timeout_s:g} s: "
            f"{first_line(error)} Check that rank 0 is running and that the address is the one it was started with."
        ) from None


def first_line(error: BaseException) -> str:
    """The first sentence of an error of torch, without the C++ source line and trace that it often carries."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = re.sub(r"^\[[^\]]*:\d+\] ", "", line).split(". ")[0].strip()
    return line if line.endswith(".") else line + "."
