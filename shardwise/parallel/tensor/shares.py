"""Collectives over values that are cut along the sequence (Korthikanti et al. 2022, section 4.2), differentiable.

    scatter: terms of a sum -> parts of the sum    and back: gather
    split:   a whole value  -> its parts           and back: merge

`gather` and `merge` both put parts together. What is gathered goes into each rank's own computations, so its gradients
are summed; what is merged is computed with alike on all ranks, so its gradient is there already. The backward of each
is its partner, which makes gradients of gradients right too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwise.comm.group import Group
from shardwise.parallel.tensor.atoms import Cut, Ids, Span, spans
from shardwise.parallel.tensor.links import GroupLinks, narrowed


class Share(NamedTuple):
    """A cut along `dim`: the spans of each rank."""

    dim: int
    held: tuple[tuple[Span, ...], ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """How many indices each rank has."""
        return tuple(sum(stop - first for first, stop in each) for each in self.held)


Way = Callable[[Tensor, Share, Group], Tensor]


@lru_cache(maxsize=1024)
def share_of(cut: Cut, ranks: int) -> Share:
    """The spans of a cut."""
    return Share(cut.dim, tuple(spans(cut.ids, rank) for rank in range(ranks)))


class SequenceLinks(GroupLinks):
    """Links over the group of the tensor axis, also for what is cut along the sequence."""

    def scatter(self, x: Tensor, share: Share) -> Tensor:
        """This rank's part of the sum of the ranks' terms `x`."""
        found: Tensor = _Exchange.apply(x, share, self.group, _reduced, _gathered)
        return found

    def gather(self, x: Tensor, share: Share) -> Tensor:
        """The whole of the ranks' parts, for computations of this rank's own."""
        found: Tensor = _Exchange.apply(x, share, self.group, _gathered, _reduced)
        return found

    def split(self, x: Tensor, share: Share) -> Tensor:
        """This rank's part of what is whole."""
        found: Tensor = _Exchange.apply(x, share, self.group, _part, _gathered)
        return found

    def merge(self, x: Tensor, share: Share) -> Tensor:
        """The whole of the ranks' parts, for what all ranks compute alike."""
        found: Tensor = _Exchange.apply(x, share, self.group, _gathered, _part)
        return found

    def join(self, x: Tensor, dim: int, ids: Ids) -> Tensor:
        """The same as `merge`."""
        return self.merge(x, share_of(Cut(dim, ids), self.ranks))

    def enter_all(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Each of them, whose gradients are the sums over the ranks: one exchange for all."""
        wanted = [x for x in given if x.requires_grad] if torch.is_grad_enabled() else []
        if not wanted:
            return given
        entered = iter(_EnterAll.apply(self.group, *wanted))
        return tuple(next(entered) if x.requires_grad else x for x in given)


class _Exchange(torch.autograd.Function):
    """What `there` gives of a tensor; its gradient goes `back`, and the gradient of that there again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, group: Group, there: Way, back: Way) -> Tensor:
        ctx.how = share, group, back, there
        return there(x.detach(), share, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Exchange.apply(grad, *ctx.how), None, None, None, None


class _EnterAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *_TotalAll.apply(ctx.group, *grads)


class _TotalAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        found = [x.new_empty(x.shape) for x in given]
        for dtype in dict.fromkeys(x.dtype for x in given):
            flat = torch.cat([x.detach().reshape(-1) for x in given if x.dtype == dtype])
            group.all_reduce(flat).wait()
            mine = [x for x in found if x.dtype == dtype]
            for x, piece in zip(mine, flat.split([x.numel() for x in mine]), strict=True):
                x.copy_(piece.view(x.shape))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *_EnterAll.apply(ctx.group, *grads)


def _part(x: Tensor, share: Share, group: Group) -> Tensor:
    """A copy, so that what keeps the part does not keep the whole."""
    return narrowed(x, share.dim, share.held[group.rank()]).clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=256)
def _orders(share: Share, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """With what each rank's part padded to the longest: which index of the whole is at each place of the parts one
    after the other, and the reverse. None where parts are equal runs in the order of the ranks."""
    most = max(share.rows)
    if all(each == ((rank * most, (rank + 1) * most),) for rank, each in enumerate(share.held)):
        return None
    order = torch.zeros(len(share.held) * most, dtype=torch.int64)  # nobody reads what pads
    places = torch.empty(sum(share.rows), dtype=torch.int64)
    for rank, each in enumerate(share.held):
        mine = torch.tensor([index for first, stop in each for index in range(first, stop)], dtype=torch.int64)
        at = torch.arange(rank * most, rank * most + len(mine))
        order[at] = mine
        places[mine] = at
    return order.to(device), places.to(device)


def _gathered(x: Tensor, share: Share, group: Group) -> Tensor:
    front = x.movedim(share.dim, 0).contiguous()
    most = max(share.rows)
    if front.shape[0] < most:
        front = torch.cat([front, front.new_zeros(most - front.shape[0], *front.shape[1:])])
    every = front.new_empty(group.size() * most, *front.shape[1:])
    as_bytes = (every.view(torch.uint8), front.view(torch.uint8)) if x.dtype == torch.bool else (every, front)
    group.all_gather_single(*as_bytes).wait()
    orders = _orders(share, x.device)
    if orders is not None:
        every = every.index_select(0, orders[1])
    return every.movedim(0, share.dim).contiguous()


def _reduced(x: Tensor, share: Share, group: Group) -> Tensor:
    front = x.movedim(share.dim, 0)
    orders = _orders(share, x.device)
    every = front.contiguous() if orders is None else front.index_select(0, orders[0])
    mine = every.new_empty(max(share.rows), *every.shape[1:])
    group.reduce_scatter_single(mine, every).wait()
    return mine[: share.rows[group.rank()]].movedim(0, share.dim).contiguous()
