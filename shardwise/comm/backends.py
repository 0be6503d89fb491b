"""What moves the bytes under a `Group`: gloo for host memory, nccl for CUDA devices."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed.distributed_c10d as dist

from shardwise.errors import CommError, MissingPackage


class Inner(NamedTuple):
    """One backend under a group and the sockets it opened, as `(file descriptor, inode)`."""

    backend: Any
    sockets: tuple[tuple[int, int], ...] = ()


def gloo(store: dist.Store, rank: int, size: int, *, timeout_s: float, host: str | None, threads: int = 1) -> Inner:
    """A gloo backend on the interface of `host`; None leaves the choice to gloo and `GLOO_SOCKET_IFNAME`.

    Raises CommError when the ranks do not find each other within `timeout_s` seconds.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    make = dist.ProcessGroupGloo
    options._devices = [make.create_device(hostname=host) if host is not None else make.create_default_device()]
    options._threads = threads
    options._timeout = timedelta(seconds=timeout_s)
    before = _connected()
    try:
        backend = dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        raise CommError(
            f"rank {rank} could not connect to the other {size - 1} rank(s) within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]} Look at the logs of the other ranks: one of them did not get this far."
        ) from None
    return Inner(backend, tuple(sorted(_connected() - before)))


def nccl(store: dist.Store, rank: int, size: int, *, timeout_s: float, host: str | None, threads: int = 1) -> Inner:
    """An nccl backend for the CUDA device of this rank. Raises MissingPackage when torch was built without it."""
    if not dist.is_nccl_available():
        raise MissingPackage(
            "this torch was built without nccl, which CUDA ranks talk over. Install a CUDA build of torch "
            "(see https://pytorch.org), or plan for the CPU."
        )
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return Inner(dist.ProcessGroupNCCL(store, rank, size, options))


BACKENDS: dict[str, Callable[..., Inner]] = {"cpu": gloo, "cuda": nccl}


def hang_up(sockets: tuple[tuple[int, int], ...]) -> None:
    """Shut the connections down: every operation on them ends at once, here and at the peers, on any thread.

    gloo's own abort leaves a waiting rank waiting; the descriptors stay open, so gloo may still close them itself.
    """
    for descriptor, inode in sockets:
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino != inode:
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


def _connected() -> set[tuple[int, int]]:
    """Descriptor and inode of every connected stream socket of this process."""
    found: set[tuple[int, int]] = set()
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError, ValueError):
            descriptor = int(name)
            about = os.fstat(descriptor)
            if not stat.S_ISSOCK(about.st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as candidate:
                if candidate.type == socket.SOCK_STREAM:
                    candidate.getpeername()
                    found.add((descriptor, about.st_ino))
    return found
