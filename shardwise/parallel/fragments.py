"""A part of the parameters of replicas that step on their own: how it meets the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Work

from shardwise.comm.codec import Codec
from shardwise.comm.group import Group
from shardwise.comm.one_pass import one_pass
from shardwise.parallel.reducer import Named


class _Sent(NamedTuple):
    """On its way: what the replica told of its distance from the meeting point (None: the kernel reads it from what all
    tell), and what all tell."""

    told: Tensor | None
    received: Tensor
    work: Work


class Fragment:
    """Parameters that are sent together, where all replicas were when they last met, and the outer optimizer's state.

    `send` starts the mean of how far the replicas are from there, as `codec` has it; what that leaves out stays in the
    replica's parameters, and is told another time. `arrive` ends it: an outer step of `rate` and Nesterov `momentum`,
    as `torch.optim.SGD` has it, moves the meeting point, and the mean takes the place of what the replica told.
    """

    def __init__(self, named: Named, group: Group, *, codec: Codec | None, rate: float, momentum: float) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self._group = group
        self._rate = rate
        self._momentum = momentum
        self._codec = codec
        self._kernel = one_pass(codec, self.parameters)
        wide = self._codec is None and any(p.dtype == torch.float64 for p in self.parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._sizes = [p.numel() for p in self.parameters]
        self.meeting = self._flat()
        self.velocity = torch.zeros_like(self.meeting) if momentum else None
        self._buffers: dict[str, Tensor] = {}
        self._sent: _Sent | None = None

    def begin_here(self) -> None:
        """All replicas are where this one is."""
        self.meeting = self._flat()

    def send(self) -> None:
        """Start to tell the others how far this replica is from the meeting point."""
        self.arrive()
        self._sent = self._sum() if self._codec is None else self._exchange(self._codec)

    def _sum(self) -> _Sent:
        told = self._away()
        received = self._buffer("mean").copy_(told)
        return _Sent(told, received, self._group.all_reduce(received, dist.ReduceOp.AVG))

    def _exchange(self, codec: Codec) -> _Sent:
        size = codec.payload_bytes(self.meeting.numel())
        mine = self._buffer("mine", size, torch.uint8)
        told = self._told(codec, mine)
        received = self._buffer("received", self._group.size() * size, torch.uint8)
        return _Sent(told, received, self._group.all_gather_single(received, mine))

    def _away(self) -> Tensor:
        told = self._flat(self._buffer("told"))
        return torch.sub(self.meeting, told, out=told)

    def _told(self, codec: Codec, payload: Tensor) -> Tensor | None:
        """Fill the payload; what the others will know from it."""
        if self._kernel is not None:
            self._kernel.tell(self.meeting, payload)
            return None
        told = self._away()
        codec.encode(told, payload)
        codec.decode(payload, told)
        return told

    def arrive(self, *, at_once: bool = False) -> None:
        """Wait for what was sent, if anything was, and follow it; `at_once`: the replica has not moved since."""
        if self._sent is None:
            return
        told, received, work = self._sent
        self._sent = None
        work.wait()
        if self._kernel is not None:
            rows, rank = received.view(self._group.size(), -1), self._group.rank()
            self._kernel.follow(self.meeting, self.velocity, rows, rank, rate=self._rate, momentum=self._momentum)
        elif told is not None:
            self._follow(told, received, at_once=at_once)

    def _follow(self, told: Tensor, received: Tensor, *, at_once: bool) -> None:
        moved = self._outer_step(self._mean(told, received))
        if at_once and self._codec is None:
            self._put(self.meeting)  # all are in one place, to the bit
            return
        instead = torch.sub(told, moved, out=told)
        with torch.no_grad():
            parts = [part.view_as(p) for p, part in zip(self.parameters, instead.split(self._sizes), strict=True)]
            torch._foreach_add_([p.detach() for p in self.parameters], parts)

    def _mean(self, told: Tensor, received: Tensor) -> Tensor:
        if self._codec is None:
            return received
        total, one = self._buffer("mean"), self._buffer("one")
        for rank, payload in enumerate(received.view(self._group.size(), -1)):
            said = told
            if rank != self._group.rank():
                said = one if rank else total
                self._codec.decode(payload, said)
            if rank:
                total.add_(said)
            elif said is told:
                total.copy_(told)
        return total.div_(self._group.size())

    def _outer_step(self, gradient: Tensor) -> Tensor:
        """How far the meeting point moved against `gradient`, which may be overwritten."""
        if self.velocity is not None:
            self.velocity.mul_(self._momentum).add_(gradient)
            gradient = gradient.add_(self.velocity, alpha=self._momentum)
        moved = gradient.mul_(self._rate) if self._rate != 1.0 else gradient
        self.meeting.sub_(moved)
        return moved

    def _flat(self, out: Tensor | None = None) -> Tensor:
        parts = [p.detach().reshape(-1).to(self._dtype) for p in self.parameters]
        return torch.cat(parts) if out is None else torch.cat(parts, out=out)

    def _buffer(self, name: str, size: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Kept from meeting to meeting: new memory costs as much as what is done with it."""
        if name not in self._buffers:
            count = self.meeting.numel() if size is None else size
            self._buffers[name] = self.meeting.new_empty(count, dtype=dtype or self._dtype)
        return self._buffers[name]

    def _put(self, flat: Tensor) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, flat.split(self._sizes), strict=True):
                parameter.copy_(value.view_as(parameter))

    # The checkpoint.

    def rows(self) -> dict[str, Tensor]:
        """What only this rank has."""
        return {f"parameter/{name}": p.detach() for name, p in zip(self.names, self.parameters, strict=True)}

    def common(self) -> dict[str, Tensor]:
        """What all ranks have alike."""
        found = self._named("meeting", self.meeting)
        return found if self.velocity is None else found | self._named("velocity", self.velocity)

    def take_rows(self, rows: Mapping[str, Tensor], rank: int) -> None:
        """Each row has one entry a rank."""
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(rows[f"parameter/{name}"][rank])

    def take_common(self, common: Mapping[str, Tensor]) -> None:
        for name, view in self.common().items():
            if name in common:
                view.copy_(common[name])

    def _named(self, kind: str, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self.names, self.parameters, flat.split(self._sizes), strict=True)
        return {f"{kind}/{name}": part.view(p.shape) for name, p, part in parts}


def cut_evenly(named: Sequence[tuple[str, nn.Parameter]], count: int) -> list[list[tuple[str, nn.Parameter]]]:
    """At most `count` runs of parameters with about as many elements each, none of them empty."""
    total = sum(p.numel() for _, p in named)
    runs: list[list[tuple[str, nn.Parameter]]] = []
    seen = 0
    for name, parameter in named:
        if not runs or (seen * count >= len(runs) * total and len(runs) < count):
            runs.append([])
        runs[-1].append((name, parameter))
        seen += parameter.numel()
    return runs
