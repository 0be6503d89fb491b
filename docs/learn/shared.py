"""Who reads what of whom when the ranks of a host share memory: noted while the package's own phases run.

All ranks live in this process and take turns, so every copy out of another rank's memory can be seen.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from tape import Hop

from shardwise.comm.kernel import Kind
from shardwise.comm.shm import DTYPES, REDUCTIONS
from shardwise.comm.torch_phases import Op, Phases
from shardwise.comm.torch_segment import CHUNK, Segment, fixed_bytes

PIECE = 16 << 10  # bytes: with fewer in all, every rank would add up everything


class Watched(Phases):
    """One rank's phases on a tensor of a piece for each rank. `hops`: what it read, from whom, of which piece."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int) -> None:
        super().__init__(Segment(memory, rank, size), range(size), [(0, 0)] * size)
        self.tensor = torch.full((size * PIECE // 8,), 10.0**rank, dtype=torch.float64)
        self.hops: list[Hop] = []

    def copied(self, target: int, source: int, nbytes: int) -> None:
        """`nbytes` were copied or added up. A phase before the first tells what is going to happen."""
        for owner in self.others:
            slots = [self.segment.data(owner, phase) for phase in (0, 1)]
            for slot in slots:
                if nbytes and slot <= source < slot + CHUNK:
                    inside = 0 <= target - self.tensor.data_ptr() < self.tensor.nbytes
                    at = target - self.tensor.data_ptr() if inside else source - slot
                    self.hops.append(Hop(self._phase - 1, owner, self.rank, at // PIECE, (at + nbytes) // PIECE))

    def _fold(self, op: Op, targets: Sequence[int], sources: Sequence[int], nbytes: int) -> None:
        for source in sources:
            self.copied(targets[0], source, nbytes)
        super()._fold(op, targets, sources, nbytes)


def all_reduce(size: int) -> tuple[tuple[Hop, ...], list[float]]:
    """What `size` ranks (3 or more) read of each other, and the first element that each has in the end."""
    memory = mmap.mmap(-1, fixed_bytes(size))
    ranks = [Watched(memory, rank, size) for rank in range(size)]
    dtype, reduction = DTYPES[torch.float64], REDUCTIONS[torch.distributed.ReduceOp.RedOpType.SUM]
    running: dict[Watched, Any] = {
        rank: rank.steps(Op(Kind.ALL_REDUCE, [rank.tensor], [rank.tensor], rank.tensor.nbytes, dtype, reduction))
        for rank in ranks
    }
    move = ctypes.memmove
    while running:
        for rank, steps in list(running.items()):

            def noted(target: int, source: int, nbytes: int, rank: Watched = rank) -> None:
                rank.copied(target, source, nbytes)
                move(target, source, nbytes)

            with mock.patch.object(ctypes, "memmove", noted):
                if next(steps, "over") == "over":
                    del running[rank]
    return tuple(sorted(hop for rank in ranks for hop in rank.hops)), [float(rank.tensor[0]) for rank in ranks]
