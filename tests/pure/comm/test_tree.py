"""The fixed tree: whatever cuts the shards into runs, sums come out in one order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm.tree import Node, nodes, owners, parent, push, span, sum_by_shard, tree_sum


def reference(start: int, stop: int, total: int) -> str:
    """The tree of a power of two over `total` leaves, cut off on the right, written with brackets."""

    def build(first: int, width: int) -> str:
        if width == 1:
            return str(first)
        left = build(first, width // 2)
        return left if first + width // 2 >= total else f"({left} {build(first + width // 2, width // 2)})"

    width = 1
    while width < total:
        width *= 2
    return build(0, width)


def join(left: str, right: str) -> str:
    return f"({left} {right})"


@given(total=st.integers(1, 40), ranks=st.integers(1, 9))
def test_any_number_of_ranks_gives_the_same_brackets(total: int, ranks: int) -> None:
    parts: list[tuple[Node, str]] = []
    for rank in range(ranks):
        mine: list[tuple[Node, str]] = []
        first, last = span(rank, ranks, total)
        for shard in range(first, last):
            push(mine, Node(shard, shard + 1), str(shard), total, join)
        assert [node for node, _ in mine] == nodes(first, last, total)
        parts += mine
    assert tree_sum(parts, total, join) == reference(0, total, total)


@given(total=st.integers(1, 64), ranks=st.integers(1, 9))
def test_runs_cover_the_shards_and_differ_by_one_at_most(total: int, ranks: int) -> None:
    runs = [span(rank, ranks, total) for rank in range(ranks)]
    assert [s for run in runs for s in range(*run)] == list(range(total))
    sizes = [run.stop - run.start for run in runs]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(sizes, reverse=True) == sizes


@given(total=st.integers(1, 64), first=st.integers(0, 63), length=st.integers(0, 64))
def test_a_run_has_at_most_two_nodes_of_each_level(total: int, first: int, length: int) -> None:
    found = nodes(min(first, total), min(first + length, total), total)
    assert len(found) <= 2 * max(1, total.bit_length())


def test_the_parent_of_the_root_is_the_root() -> None:
    assert parent(Node(0, 5), 5) == Node(0, 5)
    assert parent(Node(4, 5), 5) == Node(0, 5)
    assert parent(Node(0, 1), 5) == Node(0, 2)


def test_parts_with_a_hole_are_refused() -> None:
    with pytest.raises(ValueError, match="do not cover"):
        tree_sum([(Node(0, 1), 1.0), (Node(2, 3), 1.0)], 3, lambda a, b: a + b)


def test_numbers_are_added_in_the_order_of_the_tree() -> None:
    values = [1.0, 1e16, -1e16, 1.0]
    assert sum_by_shard(values) == (1.0 + 1e16) + (-1e16 + 1.0)
    assert sum_by_shard(values) != sum(values)


def test_owners_lists_every_rank() -> None:
    assert owners(3, 4) == {0: [Node(0, 2)], 1: [Node(2, 3)], 2: [Node(3, 4)]}
    assert owners(3, 2)[2] == []
