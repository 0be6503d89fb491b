"""Where to cut a pipeline: consecutive calls to stages, so that the slowest stage is as fast as it can be.

Dynamic programming over (stage, last call), as PipeDream's planner (Narayanan et al. 2019, section 3.1) has it for one
kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from msgspec import structs

from shardwise.errors import NoPlanFits
from shardwise.spec.plan import Plan, Stage
from shardwise.spec.profile import CallProfile, ModelProfile

Seconds = Callable[[int, int, int], float]  # of (stage, first call, last call), inclusive; infinite where it cannot be


class Chain(NamedTuple):
    """The calls, and sums over the first n of them."""

    calls: tuple[CallProfile, ...]
    flops: list[float]
    activations: list[int]

    def forward_flops(self, first: int, last: int) -> float:
        """Of calls `first..last`, for one sample."""
        return self.flops[last + 1] - self.flops[first]

    def activation_bytes(self, first: int, last: int) -> int:
        """Of calls `first..last`, for one sample."""
        return self.activations[last + 1] - self.activations[first]

    def crossing_bytes(self, first: int, last: int) -> int:
        """What comes into a stage of these calls and what leaves it, for one sample."""
        after = self.calls[last + 1].crossing_bytes if last + 1 < len(self.calls) else 0
        return (self.calls[first].crossing_bytes if first else 0) + after

    def parameters(self, first: int, last: int) -> tuple[int, int]:
        """The number of parameters in these calls, and their bytes: what is called twice is there once."""
        each = {one.name: one for one in self.calls[first : last + 1]}
        return sum(one.parameters for one in each.values()), sum(one.parameter_bytes for one in each.values())


def chain(profile: ModelProfile) -> Chain:
    """The calls of a profile, ready for sums."""
    flops = list(accumulate((one.forward_flops for one in profile.calls), initial=0.0))
    activations = list(accumulate((one.activation_bytes for one in profile.calls), initial=0))
    return Chain(profile.calls, flops, activations)


def with_stages(plan: Plan, profile: ModelProfile, seconds: Seconds) -> Plan:
    """The plan with its blocks, and its stages where it has none yet: `pipeline` x `virtual` of them.

    Raises NoPlanFits where there are fewer calls than stages.
    """
    calls, count = profile.calls, plan.pipeline * plan.virtual
    if len(calls) < count:
        raise NoPlanFits(
            f"the plan {plan} asks for {count} stages, but the model can be cut into {len(calls)} at most "
            f"({', '.join(one.name for one in calls[:8]) or 'no part'}{', ...' if len(calls) > 8 else ''}). Use fewer "
            "stages."
        )
    firsts = [stage.first for stage in plan.stages] or cut(len(calls), count, seconds)
    lasts = [*(first - 1 for first in firsts[1:]), len(calls) - 1]
    stages = tuple(
        Stage(first=first, last=last, holds=_holds(calls[first : last + 1]))
        for first, last in zip(firsts, lasts, strict=True)
    )
    return structs.replace(plan, blocks=tuple(one.name for one in calls), stages=stages)


def cut(calls: int, stages: int, seconds: Seconds) -> list[int]:
    """The first call of each stage, such that the slowest stage takes least; among those the sum of squares decides.

    Raises NoPlanFits where every choice has a stage that cannot be.
    """
    best: list[dict[int, tuple[tuple[float, float], int]]] = []  # by stage: last call -> (cost, first call)
    for stage in range(stages):
        row: dict[int, tuple[tuple[float, float], int]] = {}
        for last in range(stage, calls - (stages - 1 - stage)):
            for first in [0] if stage == 0 else range(stage, last + 1):
                before = (0.0, 0.0) if stage == 0 else best[-1].get(first - 1, ((math.inf, math.inf), 0))[0]
                own = seconds(stage, first, last)
                cost = (max(before[0], own), before[1] + own * own)
                if cost[0] < math.inf and (last not in row or cost < row[last][0]):
                    row[last] = (cost, first)
        best.append(row)
    if calls - 1 not in best[-1]:
        raise NoPlanFits(
            f"no cut of the model's {calls} parts into {stages} stages fits into the devices' memory. Use more "
            "stages, more microbatches, or devices with more memory."
        )
    firsts, last = [], calls - 1
    for row in reversed(best):
        firsts.append(row[last][1])
        last = firsts[-1] - 1
    return firsts[::-1]


def _holds(calls: Sequence[CallProfile]) -> tuple[str, ...]:
    """What a stage of these calls has beside what is in them."""
    inside = tuple(f"{one.name}." for one in calls)
    return tuple(sorted({name for one in calls for name in one.reads if not name.startswith(inside)}))
