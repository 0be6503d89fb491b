"""The key-value store in which ranks find each other; it listens on loopback only."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from shardwise.errors import CommError

LOOPBACK = "127.0.0.1"
HOST = "SHARDWISE_HOST"  # the name of the host that this rank is to believe it is on


def listen(host: str = LOOPBACK, port: int = 0) -> socket.socket:
    """A listening socket for the store; at port 0 the system chooses one. Raises OSError when it cannot."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def open_store(
    listen_fd: int | None, port: int, rank: int, world: int, timeout_s: float, *, host: str = LOOPBACK
) -> TCPStore:
    """The store of one run: rank 0 serves it on `listen_fd`, everybody (rank 0 too) connects to `host`:`port`.

    `listen_fd` is a listening socket that the store takes over (torch's own would listen on every address, even
    when told loopback). Raises CommError when nobody answers within `timeout_s` seconds.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        if listen_fd is None:
            return TCPStore(host, port, world, is_master=False, timeout=limit)
        return TCPStore(
            host, port, world, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listen_fd
        )
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"rank {rank} of {world} could not open the store at {host}:{port} within {timeout_s:g} s: "
            f"{first_line(error)} Check that rank 0 is running and that the address is the one it was started with."
        ) from None


def environment_store(
    rank: int,
    world: int,
    master_addr: str,
    master_port: int,
    timeout_s: float = 600,
    *,
    agent_store: bool | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Store:
    """The store of ranks that torchrun, Slurm or MPI started: rank 0 serves it on `master_addr` alone.

    With `agent_store` (under torchrun, unless given) the launcher already serves one there; then every rank joins it,
    under a prefix for each restart.
    Raises CommError when the address is not this host's (rank 0) or nobody answers.
    """
    if agent_store is None:
        agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if agent_store:
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        shared = open_store(None, master_port, rank, world, timeout_s, host=master_addr)
        return PrefixStore(f"shardwise/{attempt}", shared)
    if rank != 0:
        return open_store(None, master_port, rank, world, timeout_s, host=master_addr)
    try:
        listener = listen(master_addr, master_port)
    except OSError as error:
        raise CommError(
            f"rank 0 cannot listen on {master_addr}:{master_port}: {error.strerror}. MASTER_ADDR must be an address of "
            "the host that rank 0 runs on, and MASTER_PORT a port that nothing else uses."
        ) from None
    return open_store(listener.detach(), master_port, rank, world, timeout_s, host=master_addr)


def own_address(store: Store, rank: int, world: int) -> str:
    """The address on which this rank's peers reach it: loopback when all ranks share this host, else its own.

    Collective: the ranks tell each other through the store which host they are on.
    """
    inner = store
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    host = inner.host if isinstance(inner, TCPStore) else LOOPBACK
    if len(set(host_names(store, rank, world))) == 1:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the system picks the interface towards the store
        return str(probe.getsockname()[0])


def host_names(store: Store, rank: int, world: int) -> list[bytes]:
    """For each rank the name of its host: unlike for different hosts and network namespaces of one host. Collective.

    `SHARDWISE_HOST` gives a rank another one: ranks of one machine can be made to behave as if they were on several.
    """
    store.set(f"host/{rank}", os.environ.get(HOST) or _host_name())
    return [bytes(store.get(f"host/{r}")) for r in range(world)]


def _host_name() -> str:
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/net"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(path) if "/ns/" in path else Path(path).read_text().strip())
    return " ".join(parts)


def first_line(error: BaseException) -> str:
    """The first sentence of an error of torch, without the C++ source line and trace that it often carries."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = re.sub(r"^\[[^\]]*:\d+\] ", "", line).split(". ")[0].strip()
    return line if line.endswith(".") else line + "."
