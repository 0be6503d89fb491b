"""What the ranks of a pipeline do, in which order, and how long that takes when nothing costs anything but its work.

The orders are those of torch's schedules. Work is F (forward), I (backward to the inputs) or W (backward to the
weights), and B is I and W together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

SEVERAL: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Action(NamedTuple):
    """F, I, W or B of a stage on a microbatch."""

    kind: str
    stage: int
    micro: int


class Costs(NamedTuple):
    """Seconds of each kind of work of one stage."""

    forward_s: float
    input_s: float
    weight_s: float

    def of(self, kind: str) -> float:
        """Seconds of an action."""
        return {"F": self.forward_s, "I": self.input_s, "W": self.weight_s, "B": self.input_s + self.weight_s}[kind]


def orders(schedule: str, ranks: int, micros: int) -> list[list[Action]]:
    """What each rank does, in its order. `ranks` have one stage each, or two under a schedule of several."""
    if schedule in SEVERAL:
        return [_of_torch(schedule, ranks, micros, rank) for rank in range(ranks)]
    return [_plain(schedule, ranks, micros, rank) for rank in range(ranks)]


def _plain(schedule: str, ranks: int, micros: int, rank: int) -> list[Action]:
    ahead = {"naive": 1, "gpipe": micros, "1f1b": min(micros, ranks - rank)}[schedule]
    found = [Action("F", rank, micro) for micro in range(ahead)]
    for micro in range(micros):
        found.append(Action("B", rank, micro))
        if ahead + micro < micros:
            found.append(Action("F", rank, ahead + micro))
    return found


def _of_torch(schedule: str, ranks: int, micros: int, rank: int) -> list[Action]:
    count = 2 * ranks
    stages = [
        SimpleNamespace(
            stage_index=number,
            num_stages=count,
            group_size=ranks,
            group_rank=rank,
            group=None,
            device=torch.device("cpu"),
            is_first=number == 0,
            is_last=number == count - 1,
            submod=nn.Identity(),
            has_backward=True,
        )
        for number in ((rank, count - 1 - rank) if schedule == "zbv" else (rank, ranks + rank))
    ]
    order = SEVERAL[schedule](stages, micros, loss_fn=lambda output, target: output).pipeline_order[rank]
    return [
        Action(each.computation_type.value, each.stage_index, each.microbatch_index)
        for each in order
        if each is not None and each.microbatch_index < micros
    ]


def makespan(ranks: Sequence[Sequence[Action]], costs: Mapping[int, Costs]) -> float:
    """Seconds from the first action to the end of the last, when messages take no time.

    A forward waits for that of the stage before it, a backward for that of the stage after it. Raises ValueError for
    orders that wait for each other.
    """
    last = max(costs)
    ended: dict[tuple[str, int, int], float] = {}
    clocks, done = [0.0] * len(ranks), [0] * len(ranks)
    while any(at < len(order) for at, order in zip(done, ranks, strict=True)):
        before = sum(done)
        for rank, order in enumerate(ranks):
            while done[rank] < len(order):
                action = order[done[rank]]
                ready = _ready(action, last, ended)
                if ready is None:
                    break
                clocks[rank] = max(clocks[rank], ready) + costs[action.stage].of(action.kind)
                kind = "I" if action.kind == "B" else action.kind
                ended[kind, action.stage, action.micro] = clocks[rank]
                done[rank] += 1
        if sum(done) == before:
            raise ValueError(f"the ranks wait for each other after {done} actions.")
    return max(clocks)


def _ready(action: Action, last: int, ended: Mapping[tuple[str, int, int], float]) -> float | None:
    """When what an action waits for has ended; None while it has not."""
    if action.kind == "F":
        return 0.0 if action.stage == 0 else ended.get(("F", action.stage - 1, action.micro))
    if action.kind == "W":
        return ended.get(("I", action.stage, action.micro))
    return ended.get(("F", last, action.micro) if action.stage == last else ("I", action.stage + 1, action.micro))
