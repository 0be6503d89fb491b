"""Exact mode beside the sums: one thread, and buffers that follow shard 0 alone, whatever the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwise.comm.collectives import broadcast_all, largest
from shardwise.comm.mesh import Axis
from shardwise.errors import JobError


class ShardBuffers:
    """Every shard of a step starts with the same buffers, and those that shard 0 leaves are kept (rank 0 has it).

    Which buffers a training step changes is seen in the first one; a buffer that changes only later is refused.
    """

    def __init__(self, module: nn.Module, axis: Axis) -> None:
        named = dict(module.named_buffers())
        self._names = list(named)
        self._all = list(named.values())
        self._axis = axis
        self._tracked = self._all
        self._versions: list[int] = []
        self._before: list[Tensor] = []
        self._kept: list[Tensor] | None = None

    def begin(self) -> None:
        self._before = [b.clone() for b in self._tracked]
        self._kept = None
        if self._versions:
            self._versions = self._untracked()  # evaluating and saving between steps writes to all of them

    def before_forward(self) -> None:
        self._set(self._before)

    def after_forward(self, shard: int | None) -> None:
        if shard == 0:
            self._kept = [b.clone() for b in self._tracked]

    def end(self) -> None:
        """Every rank takes the buffers of shard 0. Raises JobError for a buffer that did not change at first."""
        self._set(self._kept if self._kept is not None else self._before)
        if not self._versions:
            self._choose()
        elif self._versions != self._untracked():
            raise JobError(
                "a buffer of the model that no training step had changed before changed in this one, which exact=True "
                f"cannot follow. Buffers: {', '.join(self._names)}. Let it change from the first step on, or plan "
                "without exact."
            )
        if self._axis.group is not None and self._tracked:
            broadcast_all(self._tracked, self._axis.group)

    def _choose(self) -> None:
        changed = [float(not torch.equal(b, a)) for b, a in zip(self._all, self._before, strict=True)]
        if changed:
            changed = largest(changed, self._axis.group, self._all[0].device)
        self._tracked = [b for b, c in zip(self._all, changed, strict=True) if c]
        self._versions = [0, *self._untracked()[1:]]

    def _untracked(self) -> list[int]:
        tracked = {id(b) for b in self._tracked}
        return [0, *(b._version for b in self._all if id(b) not in tracked)]

    def _set(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._tracked, values, strict=True):
            buffer.copy_(value)
