"""The loss contract: `loss(output, batch) -> (sum, weight)`, checked where it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import JobError
from shardwise.parallel.blame import name_of, shapes, user_code


def pair(function: Callable[[Any, Any], Any], output: Any, batch: Any, *, field: str = "loss") -> tuple[Tensor, Tensor]:
    """Call a loss or metric; its sum and weight as 0-dim tensors.

    Raises JobError when it fails, returns something else than two numbers, or a weight below 0.
    """
    name = name_of(function)

    def about() -> str:
        return f"The model's output was {shapes(output)} and the batch {shapes(batch)}."

    with user_code(f"{field} ({name})", about=about):
        returned = function(output, batch)
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise JobError(
            f"{field} ({name}) returned {shapes(returned)}; it must return a pair (sum, weight): the sum over the "
            f"counted elements and how many there are, such as (loss.sum(), loss.numel()). {about()}"
        )
    total, weight = (
        _scalar(value, field, name, part, about) for value, part in zip(returned, ("sum", "weight"), strict=True)
    )
    if weight.requires_grad:
        weight = weight.detach()
    return total, weight


def _scalar(value: Any, field: str, name: str, part: str, about: Callable[[], str]) -> Tensor:
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    raise JobError(
        f"the {part} that {field} ({name}) returned is {shapes(value)}; it must be one number. "
        f"Sum over the samples (reduction='sum'), do not return one value each. {about()}"
    )
