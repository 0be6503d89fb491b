"""Flat gradient buckets: each parameter's gradient is a view into one, and one message carries them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shardwise.comm.exchange import Bucketed, Pending, Piece
from shardwise.comm.tree import Node, push

Zeros = Callable[[int, torch.dtype, torch.device], Tensor]  # a 1-D tensor of zeros

ALIGN = 16  # elements: views begin on cache lines


class Buffer:
    """One flat tensor, the part of it that gradients fill, the tail behind it, and a view for each parameter."""

    def __init__(self, parameters: Sequence[nn.Parameter], offsets: Sequence[int], body: int, flat: Tensor) -> None:
        self.flat = flat
        self.body = flat[:body]
        self.tail = flat[body:]
        self.views = [_view(flat, p, o) for p, o in zip(parameters, offsets, strict=True)]


class Bucket:
    """Parameters of one dtype whose gradients are reduced together; `tail` further elements carry statistics.

    `members` are the parameters' numbers in the reducer; `zeros` allocates, where the group reduces without a copy.
    `placed`: offsets and length, where they are not one after the other.

    In exact mode a bucket also holds the finished nodes of the tree over shards, each in a buffer of its own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        members: Sequence[int],
        tail: int,
        zeros: Zeros,
        like: Tensor | None = None,
        placed: tuple[Sequence[int], int] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.members = list(members)
        self._offsets: list[int] = []
        self._body = 0
        for parameter in self.parameters:
            self._offsets.append(self._body)
            self._body += math.ceil(parameter.numel() / ALIGN) * ALIGN
        if placed is not None:
            self._offsets, self._body = list(placed[0]), placed[1]
        self._tail = tail
        self._zeros = zeros
        self._like = like if like is not None else self.parameters[0].detach()
        self._spare: list[Buffer] = []
        self.nodes: list[tuple[Node, Buffer]] = []
        self.current = self._take()
        self.missing = len(self.parameters)
        self.work: Pending | None = None

    def described(self, names: Sequence[str]) -> Bucketed:
        """The layout, with the parameters called by `names`, which their members number."""
        pieces = tuple(
            Piece(names[member], offset, tuple(parameter.shape))
            for member, offset, parameter in zip(self.members, self._offsets, self.parameters, strict=True)
        )
        return Bucketed(self._body, self._like.dtype, self._like.device, pieces)

    def _take(self) -> Buffer:
        if self._spare:
            return self._spare.pop()
        flat = self._zeros(self._body + self._tail, self._like.dtype, self._like.device)
        return Buffer(self.parameters, self._offsets, self._body, flat)

    def close_leaf(self, node: Node, total: int) -> None:
        """What the current buffer holds becomes a node of the tree and is merged with its siblings."""
        push(self.nodes, node, self.current, total, self._merge)

    def open_leaf(self) -> None:
        """Gradients go to another buffer from now on."""
        self.current = self._take()

    def zero_leaf(self, node: Node, total: int) -> None:
        """A shard without samples is a leaf of zeros."""
        empty = self._take()
        empty.body.zero_()
        push(self.nodes, node, empty, total, self._merge)

    def reset(self) -> None:
        """Be ready for the next step, also after one that an error ended."""
        self.settle()
        self.missing = len(self.parameters)

    def settle(self) -> None:
        """After the exchange: the first node's buffer has the sum, the others are free."""
        self.work = None
        if self.nodes:
            self.current = self.nodes[0][1]
            self._spare += [buffer for _, buffer in self.nodes[1:]]
            self.nodes = []

    def _merge(self, left: Buffer, right: Buffer) -> Buffer:
        left.body.add_(right.body)
        self._spare.append(right)
        return left


def _view(flat: Tensor, parameter: nn.Parameter, offset: int) -> Tensor:
    """The parameter's own strides where they leave no gaps, so that optimizers walk both in one order."""
    size, stride = parameter.size(), parameter.stride()
    if not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        stride = torch.empty(size, device="meta").stride()
    return flat.as_strided(size, stride, offset)
