"""Ranks under mpirun that time a collective on request: mpi4py's buffer interface on numpy arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
os.environ.setdefault("OMPI_MCA_btl_base_warn_component_unused", "0")

import numpy as np
from mpi4py import MPI

from bench.timed import Made, serve

COMM = MPI.COMM_WORLD


def make(operation: str, nbytes: int) -> Made:
    """As in `collectives.make`."""
    count, rank, world = max(1, nbytes // 4), COMM.Get_rank(), COMM.Get_size()
    piece = max(1, count // world)
    size = count if operation == "all_reduce" else piece * world
    whole, out, mine = (np.zeros(n, dtype=np.float32) for n in (size, size, piece))
    total, ranks = world * (world + 1) // 2, np.repeat(np.arange(1.0, world + 1, dtype=np.float32), piece)

    def fill() -> None:
        whole.fill(rank + 1)
        mine.fill(rank + 1)

    def reduce() -> None:
        COMM.Reduce(MPI.IN_PLACE if rank == 0 else whole, whole if rank == 0 else None)

    def send_recv() -> None:
        if rank >= world - world % 2:
            return
        COMM.Send(whole, rank ^ 1) if rank % 2 == 0 else COMM.Recv(whole, rank ^ 1)

    first = rank == 0
    table: dict[str, tuple[Callable[[], Any], Callable[[], bool]]] = {
        "all_reduce": (lambda: COMM.Allreduce(MPI.IN_PLACE, whole), lambda: bool((whole == total).all())),
        "reduce": (reduce, lambda: not first or bool((whole == total).all())),
        "broadcast": (lambda: COMM.Bcast(whole), lambda: bool((whole == 1).all())),
        "all_gather": (lambda: COMM.Allgather(mine, whole), lambda: np.array_equal(whole, ranks)),
        "reduce_scatter": (lambda: COMM.Reduce_scatter_block(whole, mine), lambda: bool((mine == total).all())),
        "gather": (
            lambda: COMM.Gather(mine, whole if first else None),
            lambda: not first or np.array_equal(whole, ranks),
        ),
        "scatter": (lambda: COMM.Scatter(whole if first else None, mine), lambda: bool((mine == 1).all())),
        "all_to_all": (lambda: COMM.Alltoall(whole, out), lambda: np.array_equal(out, ranks)),
        "send_recv": (
            send_recv,
            lambda: bool((whole == rank - rank % 2 + 1).all()) or rank >= world - world % 2,
        ),
        "barrier": (COMM.Barrier, lambda: True),
    }
    call, right = table[operation]
    return Made(call, fill, right)


if __name__ == "__main__":
    serve(COMM.Get_rank(), COMM.Get_size(), make)
