"""Adam's moments while replicas step on their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from shardwise.errors import SpecError
from shardwise.parallel.synchronise import Optimizers
from shardwise.spec.sync import Sync


def groups_with_moments(optimizers: Optimizers) -> list[dict[str, Any]]:
    """The parameter groups that have Adam's two `betas`."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [group for group in groups if len(group.get("betas", ())) == 2]


def refuse_without_moments(optimizers: Optimizers, sync: Sync) -> None:
    """Raises SpecError where `sync` bounds betas that no optimizer has."""
    if (sync.beta1 or sync.beta2) and not groups_with_moments(optimizers):
        raise SpecError("sync.beta1 and sync.beta2 belong to optimizers with Adam's two betas, and the job has none.")


@contextlib.contextmanager
def bounded_moments(optimizers: Optimizers, beta1: float, beta2: float) -> Iterator[None]:
    """In this block the first beta is at most `beta1` and the second at least `beta2`; 0 bounds nothing.

    What a replica's first moment remembers from before the last meeting is mostly its own noise, and its gradients have
    fewer samples than those of all ranks, so that the second moment needs more of them (Malladi et al. 2022, section
    4).
    """
    groups = groups_with_moments(optimizers) if beta1 or beta2 else []
    own = [group["betas"] for group in groups]
    for group, (first, second) in zip(groups, own, strict=True):
        group["betas"] = (min(first, beta1) if beta1 else first, max(second, beta2))
    try:
        yield
    finally:
        for group, betas in zip(groups, own, strict=True):
            group["betas"] = betas


def carry_over(optimizers: Optimizers, beta1: float, beta2: float) -> None:
    """What the moments hold of a few steps under their own betas becomes what they would hold under the bounded ones.

    Adam divides by 1 - beta^step (Kingma and Ba 2015, section 3) with the beta of now: 25 steps with 0.95, then
    taken for 25 with 0.99, would look like a gradient three times as large, and steps would be short for long.
    """
    for optimizer in optimizers:
        for group in groups_with_moments([optimizer]):
            (own1, own2), own = group["betas"], [optimizer.state.get(p, {}) for p in group["params"]]
            with bounded_moments([optimizer], beta1, beta2):
                new1, new2 = group["betas"]
            for state in own:
                step = float(state.get("step", 0))
                for moment, before, now in (("exp_avg", own1, new1), ("exp_avg_sq", own2, new2)):
                    if step > 0 and moment in state:  # Adamax has no second one
                        state[moment].mul_((1 - now**step) / (1 - before**step))
