"""What moves the bytes under a `Group`: shared memory or gloo for host memory, nccl for CUDA devices."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed.distributed_c10d as dist

from shardwise.comm.hierarchical import connect_hosts
from shardwise.comm.interfaces import INTERFACES, asked_for
from shardwise.comm.kernel import TRANSPORT, TRANSPORTS
from shardwise.comm.shm_connect import connect_shm
from shardwise.comm.shm_torch import ShmTorch
from shardwise.comm.store import host_names
from shardwise.comm.traffic import TcpSent
from shardwise.errors import CommError, MissingPackage


class Inner(NamedTuple):
    """One backend under a group; `abort(why)` frees every caller that waits in it, `leave()` ends it without an error.

    After `leave` another rank fails only if it waits for something that this one has not sent. `sent()` is how many
    bytes left this host's memory for another rank's so far, None where nobody counts.
    """

    backend: Any
    abort: Callable[[str], None]
    leave: Callable[[], None]
    name: str = "custom"
    sent: Callable[[], int | None] = lambda: None


class Membership(NamedTuple):
    """Who a backend is made for: this rank, its place among `ranks` (global numbers), the limit, gloo's address.

    `interface` is the name of a network interface and goes before `host`.
    """

    store: dist.Store
    rank: int
    ranks: tuple[int, ...]
    timeout_s: float
    host: str | None
    threads: int = 1
    interface: str = ""


def host_memory(who: Membership) -> Inner:
    """`shm` where all ranks share a host, both for ranks on several hosts, else gloo.

    `SHARDWISE_TRANSPORT` decides otherwise. Raises CommError where it asks for shm and there is none.
    """
    wanted = os.environ.get(TRANSPORT, "auto")
    if wanted not in TRANSPORTS:
        raise CommError(f"{TRANSPORT}={wanted} is none of {', '.join(TRANSPORTS)}. Leave it out, or set one of them.")
    if wanted != "auto":
        return gloo(who) if wanted == "gloo" else shm(who)
    try:
        hosts = host_names(who.store, who.rank, len(who.ranks))
        made = connect_hosts(who, hosts, gloo) if len(set(hosts)) > 1 else None
    except RuntimeError as error:
        raise _unreachable(who, error) from None
    if made is None:
        return shm(who, otherwise=gloo)
    return Inner(made, made.abort, made.leave, "hierarchical", made.sent)


def shm(who: Membership, otherwise: Callable[[Membership], Inner] | None = None) -> Inner:
    """Shared memory between the ranks of one host; where they cannot have it `otherwise`, or a CommError.

    With `SHARDWISE_TRANSPORT=shm-torch`, or where one of them has no compiled kernel, all take the path in torch.
    """
    compiled = os.environ.get(TRANSPORT) != "shm-torch"
    try:
        made = connect_shm(who.store, who.rank, who.ranks, compiled=compiled)
    except RuntimeError as error:
        raise _unreachable(who, error) from None
    if made is not None:
        name = "shm-torch" if isinstance(made, ShmTorch) else "shm"
        return Inner(made, made.abort, made.leave, name, lambda: 0)
    if otherwise is not None:
        return otherwise(who)
    raise CommError(
        "these ranks cannot share memory: they run on different hosts, or as different users, or one may not look "
        f"into another's /proc. Set {TRANSPORT}=gloo."
    )


def gloo(who: Membership) -> Inner:
    """A gloo backend on `who.interface`, those that the environment names, `who.host`, or where the host's name leads.

    Raises CommError when the ranks do not find each other in time.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    make = dist.ProcessGroupGloo
    names = [who.interface] if who.interface else asked_for()
    try:
        options._devices = [make.create_device(interface=name) for name in names] or [
            make.create_device(hostname=who.host) if who.host else make.create_default_device()
        ]
    except RuntimeError as error:
        raise CommError(
            f"gloo cannot listen on {', '.join(names) or who.host or 'this host'}: {str(error).splitlines()[0]}. Check "
            f"{INTERFACES} and GLOO_SOCKET_IFNAME."
        ) from None
    options._threads = who.threads
    options._timeout = timedelta(seconds=who.timeout_s)
    before = _connected()
    try:
        backend = dist.ProcessGroupGloo(who.store, who.rank, len(who.ranks), options)
    except RuntimeError as error:
        raise _unreachable(who, error) from None
    sockets = tuple(sorted(_connected() - before))

    def end(why: str = "") -> None:
        _hang_up(sockets)
        _ended.append(backend)

    return Inner(backend, end, end, "gloo", TcpSent(sockets))


def nccl(who: Membership) -> Inner:
    """An nccl backend for the CUDA device of this rank. Raises MissingPackage when torch was built without it."""
    if not dist.is_nccl_available():
        raise MissingPackage(
            "this torch was built without nccl, which CUDA ranks talk over. Install a CUDA build of torch "
            "(see https://pytorch.org), or plan for the CPU."
        )
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=who.timeout_s)
    backend = dist.ProcessGroupNCCL(who.store, who.rank, len(who.ranks), options)
    return Inner(backend, lambda why: backend.abort(), backend.abort, "nccl")


BACKENDS: dict[str, Callable[[Membership], Inner]] = {"cpu": host_memory, "cuda": nccl}


def _unreachable(who: Membership, error: RuntimeError) -> CommError:
    return CommError(
        f"rank {who.rank} could not connect to the other {len(who.ranks) - 1} rank(s) within {who.timeout_s:g} s: "
        f"{str(error).splitlines()[0]} Look at the logs of the other ranks: one of them did not get this far."
    )


# The last reference to a gloo backend must not be a C++ object's, such as DDP's reducer: that would join gloo's
# threads while it holds the interpreter's lock, and one of them may be waiting for that lock to let go of a tensor.
# A reference that is dropped from here releases the lock first.
_ended: collections.deque[Any] = collections.deque(maxlen=8)


def _hang_up(sockets: tuple[tuple[int, int], ...]) -> None:
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
