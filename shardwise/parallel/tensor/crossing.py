"""Where values go into a part that each rank computes its own terms of, and come out of it again.

What enters is whole, and its gradient is the sum of the ranks'; what leaves is the sum of the ranks' terms, or the same
on all of them. A backward pass meets each of these once on every rank, whatever was computed in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwise.comm.group import Group


class GroupCrossing:
    """The crossings of a group of tensor ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors, whose gradients are the sums over the ranks."""
        trained = [one for one in tensors if one.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return list(tensors)
        entered = iter(_Enter.apply(self.group, *trained))
        return [next(entered) if one.requires_grad else one for one in tensors]

    def once(self, x: Tensor) -> Tensor:
        """`x` for a computation that is the same on all ranks: its gradient counts on the first alone."""
        if not x.requires_grad or not torch.is_grad_enabled():
            return x
        found: Tensor = _Once.apply(x, self.rank)
        return found

    def leave(self, outputs: Sequence[Tensor], summed: Sequence[bool], tied: Sequence[Tensor], idle: Any) -> list[Any]:
        """The sums of the ranks' `outputs`, or the first rank's where they are not `summed`.

        `tied` are what entered: their gradients are asked for together on all ranks. `idle` parameters were used on
        another rank only: their gradients are zero, not None.
        """
        return list(_Leave.apply(self, tuple(summed), len(tied), *outputs, *tied, *idle))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.kinds = [(one.shape, one.dtype, one.device) for one in tensors]
        ctx.set_materialize_grads(False)
        return tuple(one.view_as(one) for one in tensors)

    @staticmethod
    @once_differentiable  # an error, not a gradient of a gradient that misses the other ranks
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(grads)
        for dtype in dict.fromkeys(kind[1] for kind in ctx.kinds):
            chosen = [index for index, kind in enumerate(ctx.kinds) if kind[1] == dtype]
            for index, grad in zip(
                chosen, _summed([grads[i] for i in chosen], ctx.kinds, chosen, ctx.group), strict=True
            ):
                found[index] = grad
        return (None, *found)


def _summed(grads: Sequence[Tensor | None], kinds: Any, chosen: Sequence[int], group: Group) -> list[Tensor | None]:
    """In one collective; what has a gradient on no rank has none."""
    _, dtype, device = kinds[chosen[0]]
    flags = torch.tensor([float(grad is not None) for grad in grads], dtype=dtype, device=device)
    pieces = [
        grad.reshape(-1) if grad is not None else torch.zeros(kinds[i][0].numel(), dtype=dtype, device=device)
        for i, grad in zip(chosen, grads, strict=True)
    ]
    row = torch.cat([flags, *pieces])
    group.all_reduce(row).wait()
    used, *parts = row.split([len(flags), *(piece.numel() for piece in pieces)])
    return [
        part.view(kinds[i][0]) if here else None for i, part, here in zip(chosen, parts, used.tolist(), strict=True)
    ]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int) -> Tensor:
        ctx.rank = rank
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # an error, not a gradient of a gradient that misses the other ranks
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad if ctx.rank == 0 else None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: GroupCrossing, summed: tuple[bool, ...], tied: int, *tensors: Tensor) -> Any:
        ctx.rank, ctx.summed, ctx.tied = crossing.rank, summed, tied
        ctx.idle = [(one.shape, one.dtype, one.device) for one in tensors[len(summed) + tied :]]
        ctx.set_materialize_grads(False)
        # Something is kept, so that who computes again what was kept goes this far on every rank.
        ctx.save_for_backward(tensors[0].new_empty(0))
        found = []
        for one, total in zip(tensors, summed, strict=False):
            mine = one.detach().clone(memory_format=torch.contiguous_format)
            if total:
                crossing.group.all_reduce(mine).wait()
            found.append(mine)
        return tuple(found)

    @staticmethod
    @once_differentiable  # an error, not a gradient of a gradient that misses the other ranks
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = [grad if total or ctx.rank == 0 else None for grad, total in zip(grads, ctx.summed, strict=True)]
        idle = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.idle]
        return (None, None, None, *given, *(None,) * ctx.tied, *idle)
