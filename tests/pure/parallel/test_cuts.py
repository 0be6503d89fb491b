"""Buckets as arithmetic on sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardwise.parallel.cuts import cut


@given(
    entries=st.lists(st.tuples(st.integers(1, 50), st.sampled_from("ab")), max_size=30),
    limit=st.integers(1, 120),
)
def test_every_tensor_is_in_one_bucket_of_its_kind_and_buckets_keep_the_limit(
    entries: list[tuple[int, str]], limit: int
) -> None:
    sizes, kinds = [e[0] for e in entries], [e[1] for e in entries]
    found = cut(sizes, kinds, limit)
    assert sorted(i for members in found for i in members) == list(range(len(entries)))
    for members in found:
        assert members == sorted(members)
        assert len({kinds[i] for i in members}) == 1
        assert sum(sizes[i] for i in members) <= limit or len(members) == 1
    assert [members[-1] for members in found] == sorted(members[-1] for members in found)


def test_neighbours_share_a_bucket_until_it_is_full() -> None:
    assert cut([10, 10, 10, 50, 5], ["f"] * 5, 25) == [[0, 1], [2], [3], [4]]
    assert cut([1, 1, 1, 1], ["f", "h", "f", "h"], 100) == [[0, 2], [1, 3]]
