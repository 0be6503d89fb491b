"""Where to cut a pipeline: consecutive calls to stages, so that the slowest stage is as fast as it can be.

Dynamic programming over (stage, last call), as PipeDream's planner (Narayanan et al. 2019, section 3.1) has it for one
kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from glob import escape
from itertools import accumulate
from typing import NamedTuple

from msgspec import structs

from shardwise.errors import NoPlanFits, SpecError
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
        """The number of parameters that a stage of these calls has, and their bytes: what is called or read twice is
        there once."""
        here = self.calls[first : last + 1]
        each = {one.name: one for one in here}
        reads = {name: one.reads[name] for one in here for name in _holds(here, plain=True) if name in one.reads}
        count, size = sum(one.parameters for one in each.values()), sum(one.parameter_bytes for one in each.values())
        return count + sum(n for n, _ in reads.values()), size + sum(size for _, size in reads.values())

    def arriving_bytes(self, first: int) -> int:
        """What comes into a stage that begins with this call, for one sample."""
        return self.calls[first].crossing_bytes if first else 0


def chain(profile: ModelProfile) -> Chain:
    """The calls of a profile, ready for sums."""
    flops = list(accumulate((one.forward_flops for one in profile.calls), initial=0.0))
    activations = list(accumulate((one.activation_bytes for one in profile.calls), initial=0))
    return Chain(profile.calls, flops, activations)


def with_stages(plan: Plan, profile: ModelProfile, seconds: Seconds) -> Plan:
    """The plan with its blocks, and its stages where it has none yet: `pipeline` x `virtual` of them.

    Raises NoPlanFits where there are fewer calls than stages, SpecError for stages that are not all of them in order.
    """
    calls, count = profile.calls, plan.pipeline * plan.virtual
    if len(calls) < count:
        raise NoPlanFits(
            f"the plan {plan} asks for {count} stages, but the model can be cut into {len(calls)} at most "
            f"({', '.join(one.name for one in calls[:8]) or 'no part'}{', ...' if len(calls) > 8 else ''}). Use fewer "
            "stages."
        )
    asked = plan.stages or _stages(cut(len(calls), count, seconds), len(calls))
    ends = [-1, *(stage.last for stage in asked)]
    gaps = [s for s, end in zip(asked, ends, strict=False) if s.first != end + 1 or s.last < s.first]
    if gaps or ends[-1] + 1 != len(calls):
        raise SpecError(
            f"stages of the plan are {[(stage.first, stage.last) for stage in asked]}: together they must be the "
            f"{len(calls)} parts of the model, 0 to {len(calls) - 1}, one stage after the other."
        )
    stages = tuple(structs.replace(each, holds=_holds(calls[each.first : each.last + 1])) for each in asked)
    return structs.replace(plan, blocks=tuple(one.name for one in calls), stages=stages)


def _stages(firsts: Sequence[int], calls: int) -> tuple[Stage, ...]:
    lasts = [*(first - 1 for first in firsts[1:]), calls - 1]
    return tuple(Stage(first=first, last=last) for first, last in zip(firsts, lasts, strict=True))


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


def _holds(calls: Sequence[CallProfile], *, plain: bool = False) -> tuple[str, ...]:
    """What a stage of these calls has beside what is in them: patterns that match the names, or the `plain` names."""
    inside = tuple(f"{one.name}." for one in calls)
    found = sorted({name for one in calls for name in one.reads if not name.startswith(inside)})
    return tuple(name if plain else escape(name) for name in found)
