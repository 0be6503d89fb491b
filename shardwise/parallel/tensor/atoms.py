"""Who holds which index of a dim: while a split is looked for (atoms that must stay together), and when it is found.

A value that is cut along a dim has a number for each index of it. While looking, numbers are atoms, and what an
operation needs on one rank becomes one atom; afterwards they are the ranks themselves, and what does not fit conflicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple, Protocol

Ids = tuple[int, ...]
Span = tuple[int, int]


class Cut(NamedTuple):
    """A value that is cut along `dim`; `ids` has a number for each of its indices."""

    dim: int
    ids: Ids


class Conflict(Exception):
    """An operation cannot run on a value that is cut like this."""


class Numbers(Protocol):
    """Of what the numbers are."""

    def same(self, a: Ids, b: Ids) -> None:
        """From now on `a[i]` and `b[i]` are on one rank. Raises Conflict where they are not."""

    def alike(self, a: Ids, b: Ids) -> bool:
        """Whether they are already."""


class Atoms:
    """Numbers that may be joined."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def fresh(self, count: int) -> Ids:
        first = len(self._parent)
        self._parent += range(first, first + count)
        return tuple(range(first, first + count))

    def find(self, one: int) -> int:
        root = one
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[one] != root:
            self._parent[one], one = root, self._parent[one]
        return root

    def resolve(self, ids: Ids) -> Ids:
        return tuple(map(self.find, ids))

    def same(self, a: Ids, b: Ids) -> None:
        if len(a) != len(b):
            raise Conflict("dims of unlike lengths")
        if a is b or a == b:
            return
        for one, other in zip(a, b, strict=True):
            low, high = sorted((self.find(one), self.find(other)))
            self._parent[high] = low

    def alike(self, a: Ids, b: Ids) -> bool:
        return a is b or a == b or (len(a) == len(b) and self.resolve(a) == self.resolve(b))


class Ranks:
    """Numbers that are ranks."""

    def same(self, a: Ids, b: Ids) -> None:
        if a != b:
            raise Conflict("its operands are cut in different ways")

    def alike(self, a: Ids, b: Ids) -> bool:
        return a == b


def spans(ids: Ids, rank: int) -> tuple[Span, ...]:
    """The indices of `rank`, as spans."""
    found: list[Span] = []
    for index, owner in enumerate(ids):
        if owner != rank:
            continue
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return tuple(found)


def deal(classes: Sequence[int], ranks: int) -> dict[int, int]:
    """Atoms, in their order, -> ranks: equal parts, the first ranks one more where they do not divide."""
    each, more = divmod(len(classes), ranks)
    found: dict[int, int] = {}
    for rank in range(ranks):
        first = rank * each + min(rank, more)
        found |= dict.fromkeys(classes[first : first + each + (rank < more)], rank)
    return found


def parts_of(owners: Ids, ranks: int) -> tuple[int, ...]:
    """`Split.parts` of a dim: runs of rising ranks are its fused pieces, in the largest unit that they share."""
    runs: list[tuple[int, int]] = []
    for owner in owners:
        if runs and runs[-1][0] == owner:
            runs[-1] = (owner, runs[-1][1] + 1)
        else:
            runs.append((owner, 1))
    found: list[int] = []
    before = ranks
    for owner, count in runs:
        if owner <= before:
            found += [0] * ranks
        found[len(found) - ranks + owner] = count
        before = owner
    return _smallest(found)


def _smallest(parts: Sequence[int]) -> tuple[int, ...]:
    unit = gcd(*parts)
    return tuple(part // unit for part in parts)
