"""A parameter server whose workers go in step, each of them a server too: collectives in place of messages.

    push     a reduce-scatter of each flat of gradients, as soon as it is complete: every server gets its piece's sum
    update   every server steps its piece of the parameters
    pull     an all-gather of each flat of parameters

The bytes are those of an all-reduce, which is these two halves; the optimizer's work is shared out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import Work

from shardwise.comm.group import Group
from shardwise.comm.param_flats import Flats
from shardwise.comm.param_store import Store


class Lockstep:
    """What every rank calls in the same order: `send` each flat, `settle`, then `update` (or nothing, to skip)."""

    def __init__(self, flats: Flats, group: Group, store: Store) -> None:
        self._flats = flats
        self._group = group
        self._store = store
        me = group.rank()
        self._mine = [torch.zeros_like(flats.piece(grads, i, me)) for i, grads in enumerate(flats.grads)]
        self._views = store.views(self._mine)
        self._work: list[Work | None] = [None] * len(self._mine)

    def send(self, flat: int) -> Work:
        """Start the sum of one flat over all workers, while others are still computed."""
        work = self._group.reduce_scatter_single(self._mine[flat], self._flats.grads[flat])
        self._work[flat] = work
        return work

    def settle(self, row: Tensor) -> tuple[Tensor, float]:
        """Wait for all sums; `row` (float64) summed over the ranks, and the 2-norm of the whole gradient sum.

        Both have the same bits on all ranks.
        """
        for number, work in enumerate(self._work):
            if work is not None:
                work.wait()
                self._work[number] = None
        square = torch.zeros(1, dtype=torch.float64, device=row.device)
        for piece in self._mine:
            wide = torch.float64 if piece.dtype == torch.float64 else torch.float32
            square += torch.linalg.vector_norm(piece, dtype=wide).double().square()
        both = torch.cat([row, square])
        self._group.all_reduce(both).wait()
        return both[:-1], float(both[-1].sqrt())

    def update(self, factor: float, used: set[int]) -> None:
        """Step this server's piece with `factor` times the sums, and everybody gets all new values."""
        if factor != 1.0:
            for piece in self._mine:
                piece.mul_(factor)
        self._store.step(self._views, used)
        self._store.version += 1
        me, group = self._group.rank(), self._group
        flats = enumerate(self._flats.values)
        works = [group.all_gather_single(values, self._flats.piece(values, i, me)) for i, values in flats]
        for work in works:
            work.wait()
