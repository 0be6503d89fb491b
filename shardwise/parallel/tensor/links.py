"""What connects the tensor ranks inside of a module: differentiable collectives (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.comm.group import Group
from shardwise.parallel.tensor.atoms import Ids, Span, spans


class GroupLinks:
    """Links over the group of the tensor axis."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()
        self.told: set[tuple[str, str]] = set()  # modules of which something was said, and what
        self._spans: dict[Ids, tuple[tuple[int, int], ...]] = {}

    def enter(self, x: Tensor) -> Tensor:
        """`x`, whose gradient is the sum over the ranks."""
        return _entered(x, self.group)

    def total(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """The sum of the ranks' terms, and `addend` once."""
        found: Tensor = _Total.apply(x, self.group)
        return found if addend is None else found + addend.to(found.dtype)

    def take(self, x: Tensor, dim: int, ids: Ids) -> Tensor:
        """This rank's indices of `dim`."""
        if ids not in self._spans:
            self._spans[ids] = spans(ids, self.rank)
        return narrowed(x, dim, self._spans[ids])

    def join(self, x: Tensor, dim: int, ids: Ids) -> Tensor:
        """The whole tensor of which each rank has its indices of `dim`."""
        found: Tensor = _Join.apply(x, self, dim, ids)
        return found


def narrowed(x: Tensor, dim: int, held: Sequence[Span]) -> Tensor:
    """The indices of the spans along `dim`."""
    pieces = [x.narrow(dim, first, stop - first) for first, stop in held]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)


# The gradient of each is made of the others, so that gradients of gradients are right too.


def _entered(x: Tensor, group: Group) -> Tensor:
    if not x.requires_grad or not torch.is_grad_enabled():
        return x
    entered: Tensor = _Enter.apply(x, group)
    return entered


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        mine = x.detach().clone(memory_format=torch.contiguous_format)  # others may read `x`, or compute again with it
        group.all_reduce(mine).wait()
        ctx.group = group
        return mine

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _entered(grad, ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, links: GroupLinks, dim: int, ids: Ids) -> Tensor:
        ctx.links, ctx.dim, ctx.ids = links, dim, ids
        return gathered(x, links, dim, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.links.take(ctx.links.enter(grad), ctx.dim, ctx.ids), None, None, None


def gathered(x: Tensor, links: GroupLinks, dim: int, ids: Ids) -> Tensor:
    """The ranks' parts of a tensor put together along `dim`; outside of autograd."""
    rows = [sum(stop - first for first, stop in spans(ids, rank)) for rank in range(links.ranks)]
    front = x.detach().movedim(dim, 0)
    most = max(rows)
    padded = front.new_zeros(most, *front.shape[1:])
    padded[: front.shape[0]] = front
    every = padded.new_empty(links.ranks * most, *front.shape[1:])
    as_bytes = (every.view(torch.uint8), padded.view(torch.uint8)) if x.dtype == torch.bool else (every, padded)
    links.group.all_gather_single(*as_bytes).wait()
    whole = front.new_empty(len(ids), *front.shape[1:])
    for rank, count in enumerate(rows):
        at = rank * most
        for first, stop in spans(ids, rank):
            whole[first:stop] = every[at : at + stop - first]
            at += stop - first
        assert at == rank * most + count
    return whole.movedim(0, dim).contiguous()
