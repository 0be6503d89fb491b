"""A backend without peers: the other ranks give what this rank gives, and faults happen where a script says."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch.distributed.distributed_c10d as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from shardwise.comm.backends import Inner
from shardwise.comm.group import Group

Fault = Literal["hang", "die"]


class FakeWork:
    """An operation that has ended, that failed, or that never ends."""

    def __init__(self, fault: Fault | None) -> None:
        self._fault = fault
        self._never = threading.Event()

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._fault == "hang":
            self._never.wait(timeout.total_seconds() if timeout is not None else None)
            raise RuntimeError("Operation timed out!")
        if self._fault == "die":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1. This is the script's doing.")
        return True

    def is_completed(self) -> bool:
        return self._fault != "hang"

    def is_success(self) -> bool:
        return self._fault is None


class FakeBackend:
    """Computes every collective as if all `size` ranks held this rank's tensors, at once and without a socket.

    `faults` maps the number of an operation (1-based) to what happens to it: `hang` (never ends) or `die` (a peer is
    gone). `calls` has the names of the operations so far.
    """

    def __init__(self, size: int, faults: Mapping[int, Fault] | None = None) -> None:
        self._size = size
        self._faults = dict(faults or {})
        self.calls: list[str] = []

    def _done(self, name: str) -> FakeWork:
        self.calls.append(name)
        return FakeWork(self._faults.get(len(self.calls)))

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> FakeWork:
        if opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self._size)
        return self._done("all_reduce")

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> FakeWork:
        return self._done("broadcast")

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any) -> FakeWork:
        output.view(self._size, -1).copy_(input.reshape(1, -1).expand(self._size, -1))
        return self._done("all_gather")

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any) -> FakeWork:
        output.copy_(input.reshape(self._size, -1)[0].view_as(output) * self._size)
        return self._done("reduce_scatter")

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any
    ) -> FakeWork:
        output.copy_(input.view_as(output))
        return self._done("all_to_all")

    def barrier(self, opts: Any) -> FakeWork:
        return self._done("barrier")


def fake_group(size: int, faults: Mapping[int, Fault] | None = None, *, timeout_s: float = 1.0) -> Group:
    """A Group of `size` ranks of which only this one (rank 0) is there."""
    inner = Inner(FakeBackend(size, faults), abort=lambda why: None, leave=lambda: None)
    return Group(HashStore(), 0, size, {"cpu": inner}, timeout_s=timeout_s)
