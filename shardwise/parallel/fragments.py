"""A part of the parameters of replicas that step on their own: how it meets the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.comm.codec import Codec
from shardwise.comm.group import Group
from shardwise.comm.work import GuardedWork
from shardwise.parallel.reducer import Named


class Fragment:
    """Parameters that are sent together, where all replicas were when they last met, and the outer optimizer's state.

    `send` starts the mean of what the replicas moved since then (as `codec` rounds it; what rounding took away goes
    with the next one), `arrive` ends it: an outer step of `rate` and Nesterov `momentum`, as `torch.optim.SGD` has it,
    moves the meeting point, and the replica with it.
    """

    def __init__(self, named: Named, group: Group, *, codec: Codec | None, rate: float, momentum: float) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self._group = group
        self._rate = rate
        self._momentum = momentum
        self._codec = codec
        wide = self._codec is None and any(p.dtype == torch.float64 for p in self.parameters)
        self._dtype = torch.float64 if wide else torch.float32
        self._sizes = [p.numel() for p in self.parameters]
        self.meeting = self._flat()
        self.velocity = torch.zeros_like(self.meeting)
        self.residual = torch.zeros_like(self.meeting) if self._codec is not None else None
        self._sent: tuple[Tensor, Tensor, GuardedWork] | None = None

    def send(self) -> None:
        """Start to tell the others how far this replica has come."""
        self.arrive()
        here = self._flat()
        moved = self.meeting - here
        if self._codec is None:
            self._sent = here, moved, self._group.all_reduce(moved, dist.ReduceOp.AVG)
            return
        assert self.residual is not None
        moved.add_(self.residual)
        mine = torch.empty(self._codec.payload_bytes(moved.numel()), dtype=torch.uint8, device=moved.device)
        self._codec.encode(moved, mine)
        told = torch.empty_like(moved)
        self._codec.decode(mine, told)
        torch.sub(moved, told, out=self.residual)
        all_payloads = mine.new_empty(self._group.size() * mine.numel())
        self._sent = here, all_payloads, self._group.all_gather_single(all_payloads, mine)

    def arrive(self) -> None:
        """Wait for what was sent, if anything was, and follow it."""
        if self._sent is None:
            return
        here, received, work = self._sent
        self._sent = None
        work.wait()
        self._outer_step(self._mean(received))
        now = self._flat()
        # a replica that has gone on since keeps the way it went; one that has not is where the others are, to the bit
        target = self.meeting if torch.equal(now, here) else now.add_(self.meeting - here)
        self._put(target)

    def _mean(self, received: Tensor) -> Tensor:
        if self._codec is None:
            return received
        total = torch.zeros_like(self.meeting)
        one = torch.empty_like(total)
        for payload in received.view(self._group.size(), -1):
            self._codec.decode(payload, one)
            total.add_(one)
        return total.div_(self._group.size())

    def _outer_step(self, gradient: Tensor) -> None:
        if self._momentum:
            self.velocity.mul_(self._momentum).add_(gradient)
            gradient = gradient.add(self.velocity, alpha=self._momentum)
        self.meeting.sub_(gradient, alpha=self._rate)

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).to(self._dtype) for p in self.parameters])

    def _put(self, flat: Tensor) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, flat.split(self._sizes), strict=True):
                parameter.copy_(value.view_as(parameter))

    # The checkpoint.

    def rows(self) -> dict[str, Tensor]:
        """What only this rank has: its parameters, and what rounding took away."""
        found = {f"parameter/{name}": p.detach() for name, p in zip(self.names, self.parameters, strict=True)}
        return found | (self._named("residual", self.residual) if self.residual is not None else {})

    def common(self) -> dict[str, Tensor]:
        """What all ranks have alike."""
        return self._named("meeting", self.meeting) | self._named("velocity", self.velocity)

    def take_rows(self, rows: Mapping[str, Tensor], rank: int) -> None:
        """Each row has one entry a rank."""
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(rows[f"parameter/{name}"][rank])
            if self.residual is not None:
                for name, view in self._named("residual", self.residual).items():
                    if name in rows:
                        view.copy_(rows[name][rank])

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
