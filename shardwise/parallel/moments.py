"""Adam's moments while replicas step on their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shardwise.errors import SpecError
from shardwise.parallel.synchronise import Optimizers


def has_moments(optimizers: Optimizers) -> bool:
    """Whether any of them has Adam's `betas`."""
    return any("betas" in group for optimizer in optimizers for group in optimizer.param_groups)


@contextlib.contextmanager
def bounded_moments(optimizers: Optimizers, beta1: float, beta2: float) -> Iterator[None]:
    """In this block the first beta is at most `beta1` and the second at least `beta2`; 0 bounds nothing.

    What a replica's first moment remembers from before the last meeting is mostly its own noise, and its gradients have
    fewer samples than those of all ranks, so that the second moment needs more of them (Malladi et al. 2022, section
    4).
    Raises SpecError where there is a bound but no optimizer with `betas`.
    """
    if not beta1 and not beta2:
        yield
        return
    if not has_moments(optimizers):
        raise SpecError(
            "sync.beta1 and sync.beta2 belong to optimizers with Adam's betas, and the job has none. Leave them out."
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "betas" in group]
    own = [group["betas"] for group in groups]
    for group, (first, second) in zip(groups, own, strict=True):
        group["betas"] = (min(first, beta1) if beta1 else first, max(second, beta2))
    try:
        yield
    finally:
        for group, betas in zip(groups, own, strict=True):
            group["betas"] = betas
