"""A fixed binary tree over shard indices: the same sums in the same order, whatever rank holds which shards.

       [0,4)          Node [a, b) of level l covers the shards a .. a + 2^l, cut off at the last shard; a node without
      /     \\        a right half is its left half. A rank with a run of shards can finish every node that lies
   [0,2)   [2,4)      within its run; these are its canonical nodes, at most two of each level.
   /  \\    /  \\
  0    1  2    3
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """Shards `start` to `stop` (exclusive), the range of one node of the tree."""

    start: int
    stop: int


def span(rank: int, ranks: int, total: int) -> Node:
    """The run of shards that `rank` owns: contiguous blocks that differ by one at most, the longer ones first."""
    size, longer = divmod(total, ranks)
    start = rank * size + min(rank, longer)
    return Node(start, start + size + (rank < longer))


def parent(node: Node, total: int) -> Node:
    """The smallest node of the tree over `total` shards that holds more than `node`; the root is its own parent."""
    width = 1
    while True:
        start = node.start // width * width
        above = Node(start, min(start + width, total))
        if above.start <= node.start and above.stop >= node.stop and above != node:
            return above
        if width >= total:
            return node
        width *= 2


def push(nodes: list[tuple[Node, T]], node: Node, value: T, total: int, add: Callable[[T, T], T]) -> None:
    """Append `node` to its left neighbours in `nodes` and merge siblings as long as the last two are siblings."""
    nodes.append((node, value))
    while len(nodes) > 1:
        (left, first), (right, second) = nodes[-2:]
        merged = Node(left.start, right.stop)
        if left.stop != right.start or parent(left, total) != merged or parent(right, total) != merged:
            return
        nodes[-2:] = [(merged, add(first, second))]


def nodes(first: int, last: int, total: int) -> list[Node]:
    """The canonical nodes of the shards `first` to `last` (exclusive), from left to right."""
    found: list[tuple[Node, None]] = []
    for shard in range(first, last):
        push(found, Node(shard, shard + 1), None, total, lambda a, b: None)
    return [node for node, _ in found]


def tree_sum(parts: Iterable[tuple[Node, T]], total: int, add: Callable[[T, T], T]) -> T:
    """The sum over the whole tree of parts that cover it, from left to right. Raises ValueError when they do not."""
    found: list[tuple[Node, T]] = []
    for node, value in parts:
        push(found, node, value, total, add)
    if len(found) != 1 or found[0][0] != Node(0, total):
        raise ValueError(f"the parts {[tuple(n) for n, _ in found]} do not cover the shards 0 to {total}")
    return found[0][1]


def sum_by_shard(values: Sequence[float]) -> float:
    """The tree's sum of one number a shard."""
    return tree_sum(((Node(i, i + 1), v) for i, v in enumerate(values)), len(values), lambda a, b: a + b)


def owners(ranks: int, total: int) -> Mapping[int, list[Node]]:
    """The canonical nodes of every rank; a rank without shards has none."""
    return {rank: nodes(*span(rank, ranks, total), total) for rank in range(ranks)}
