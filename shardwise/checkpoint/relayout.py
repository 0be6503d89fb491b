"""Relayout: intersect the boxes that there are with the boxes that are wanted, and move the difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from shardwise.spec.layout import Box, intersect, local_offsets


class Move(Struct, frozen=True):
    """Copy the elements `take` of the box number `source`, counted from its corner, to `put` of the local tensor."""

    source: int
    take: Box
    put: Box


def moves(have: Sequence[Box], want: Sequence[Box]) -> Iterator[Move]:
    """What a rank that shall hold the boxes `want` copies from where the boxes `have` lie, all of one global tensor.

    `have` may come from any plan; when it covers the tensor exactly once, every wanted element is moved exactly once.
    `want` is in local order, as `spec.layout.boxes` gives it.
    """
    for wanted, start in zip(want, local_offsets(want), strict=True):
        for index, box in enumerate(have):
            both = intersect(box, wanted)
            if both is not None:
                inner = both.within(wanted)
                place = Box(tuple(a + b for a, b in zip(inner.offset, start, strict=True)), both.shape)
                yield Move(index, both.within(box), place)
