"""torch's grouped product, by which mixtures of experts compute, knows no float64: there it runs expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwise.parallel.tensor.rows import Standin, use

GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


class Doubles(TorchFunctionMode):
    """In this block grouped products of float64 are those of `grouped`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in GROUPED and args[0].dtype == torch.float64:
            if any(isinstance(one, Standin) for one in (*args, *kwargs.values())):
                return use("grouped_mm", grouped, args, kwargs)
            return grouped(*args, **kwargs)
        return func(*args, **kwargs)


def grouped(x: Tensor, weight: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """Rows of `x` [n, i], up to `offs[e]` those of expert `e`, times `weight[e]` [i, o]; zeros after the last."""
    ends = [0, *offs.tolist()]
    found = [x[a:b] @ weight[e] for e, (a, b) in enumerate(zip(ends, ends[1:], strict=False))]
    return torch.cat([*found, x.new_zeros(x.shape[0] - ends[-1], weight.shape[2])])


def in_doubles(module: nn.Module) -> bool:
    """Whether a module may compute grouped products in float64."""
    return any(p.dim() == 3 and p.dtype == torch.float64 for p in module.parameters())


def doubled(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, with grouped products of float64."""
    with Doubles():
        return function(*args)
