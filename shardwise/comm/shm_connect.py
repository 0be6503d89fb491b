"""`connect_shm`: the ranks of one host make the memory that they share, or agree that they have none."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed.distributed_c10d as dist

from shardwise.comm.kernel import kernel, loadable
from shardwise.comm.shm import CHUNK, HEAP, PIPE, Shm
from shardwise.comm.shm_torch import ShmTorch
from shardwise.comm.torch_segment import fixed_bytes

MOST = 1024  # ranks of a group: each has its part of a chunk
MAP_NORESERVE = 0x4000  # Linux's numbers, which the standard library has from 3.13 on or not at all
F_ADD_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 1, 2, 4


def connect_shm(store: dist.Store, rank: int, ranks: Sequence[int], *, compiled: bool = True) -> Shm | None:
    """The shared memory of the ranks of a group, or None (on all of them) when they cannot have one.

    They cannot when they run on different hosts or for different users. When one has no compiled kernel, or says that
    it wants none (not `compiled`), all of them take `ShmTorch`. The memory is an anonymous file that has no name: only
    processes of the same user that may look into this one, as a debugger does, can open it. It goes when the last of
    its processes does, however that ends.
    Collective. Raises RuntimeError when a rank does not answer within the store's time limit.
    """
    size = len(ranks)
    store.set(f"shm/{rank}", f"{os.getpid()} {'kernel' if compiled and loadable() else 'torch'} {_place()}")
    told = [store.get(f"shm/{r}").decode().split(" ", 2) for r in range(size)]
    if len({place for _, _, place in told}) > 1 or not told[0][2] or size > MOST:
        return None
    pids = [int(pid) for pid, _, _ in told]
    kind = Shm if all(inside == "kernel" for _, inside, _ in told) else ShmTorch
    number = _create(kind, size) if rank == 0 else -1
    if rank == 0:
        store.set("shm/file", str(number))
    made = _open(kind, store, rank, ranks, pids, number)
    store.set(f"shm/made/{rank}", "yes" if made else "no")
    everywhere = all(store.get(f"shm/made/{r}") == b"yes" for r in range(size))
    return made if everywhere else None


def _length(kind: type[Shm], size: int) -> int:
    fixed = fixed_bytes(size) if kind is ShmTorch else int(kernel().shm_fixed(size, CHUNK, PIPE))
    return fixed + size * HEAP


def _create(kind: type[Shm], size: int) -> int:
    """A descriptor of an anonymous file of that length that nobody can make shorter; -1 where it cannot be made."""
    try:
        descriptor = os.memfd_create("shardwise", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return -1
    try:
        os.ftruncate(descriptor, _length(kind, size))
        fcntl.fcntl(descriptor, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _open(
    kind: type[Shm], store: dist.Store, rank: int, ranks: Sequence[int], pids: Sequence[int], own: int
) -> Shm | None:
    """Map the file of rank 0 and watch the others; None where this process may not."""
    number = int(store.get("shm/file"))
    opened: list[int] = []
    try:
        if number < 0:
            return None
        for r, pid in enumerate(pids):
            opened.append(-1 if r == rank else os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC))
        opened.append(own if rank == 0 else os.open(f"/proc/{pids[0]}/fd/{number}", os.O_RDWR | os.O_CLOEXEC))
        segment = mmap.mmap(opened[-1], _length(kind, len(ranks)), mmap.MAP_SHARED | MAP_NORESERVE)
        segment.madvise(mmap.MADV_DONTDUMP)  # a core dump would fill all of its addresses
        return kind(segment, rank, ranks, opened)
    except (OSError, ValueError):
        for descriptor in {*opened, own}:
            if descriptor >= 0:
                os.close(descriptor)
        return None


def _place() -> str:
    """Alike for processes that can share memory; empty where this one cannot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:
        return ""
