"""Sample order: a permutation each epoch, the same however it is asked for."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data import order

SEEDS = st.integers(min_value=0, max_value=2**64)


@given(st.integers(1, 3000), SEEDS, st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    found = order.sample_indices(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert sorted(found.tolist()) == list(range(n))


@given(st.integers(1, 10**12), SEEDS, st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
def test_many_positions_at_once_equal_one_at_a_time(n: int, seed: int, positions: list[int]) -> None:
    assert order.sample_indices(positions, n, seed).tolist() == [order.sample_index(p, n, seed) for p in positions]
    assert order.stream_seeds(seed, positions).tolist() == [order.stream_seed(seed, p) for p in positions]


def test_small_permutations_are_all_equally_likely() -> None:
    n, epochs = 4, 24_000
    found = order.sample_indices(np.arange(n * epochs), n, 1).reshape(epochs, n)
    times = Counter(map(tuple, found.tolist()))
    expected = epochs / math.factorial(n)
    assert len(times) == math.factorial(n)
    chi_squared = sum((count - expected) ** 2 / expected for count in times.values())
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_neighbours_in_the_order_are_not_neighbours_in_the_data() -> None:
    n = 100_000
    found = order.sample_indices(np.arange(n), n, 7)
    correlation = np.corrcoef(np.arange(n), found)[0, 1]
    steps = np.abs(np.diff(found))
    assert abs(correlation) < 0.02
    assert abs(steps.mean() / (n / 3) - 1) < 0.02  # the mean distance of two uniform draws is n / 3


def test_seeds_and_epochs_give_different_orders() -> None:
    first, second = (order.sample_indices(np.arange(2000), 1000, seed).reshape(2, 1000) for seed in (0, 1))
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[1], second[1])):
        assert (one == other).mean() < 0.02


def test_the_order_is_kept_over_versions() -> None:
    """A checkpoint holds the step alone: with another order, a resumed run would repeat and miss samples."""
    assert order.sample_indices(range(8), 100, 0).tolist() == FIXED_ORDER
    assert order.stream_seed(0, 1, 2, 3) == FIXED_SEED


FIXED_ORDER = [15, 0, 79, 97, 19, 99, 3, 76]
FIXED_SEED = 411270340898705926


@given(st.integers(0, 500), st.integers(1, 9))
def test_rank_slices_are_a_balanced_partition(global_batch: int, ranks: int) -> None:
    slices = [order.rank_slice(global_batch, ranks, rank) for rank in range(ranks)]
    assert [i for one in slices for i in one] == list(range(global_batch))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 9))
def test_shards_do_not_depend_on_ranks_and_every_shard_has_one_owner(batch: int, shards: int, ranks: int) -> None:
    owned = [order.shards_of(rank, ranks, shards) for rank in range(ranks)]
    assert [shard for one in owned for shard in one] == list(range(shards))
    assert [i for one in order.shard_slices(batch, shards) for i in one] == list(range(batch))


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="part 2 of 2"):
        order.rank_slice(8, 2, 2)
    with pytest.raises(ValueError, match="at least one sample"):
        order.sample_index(0, 0, 0)


@given(SEEDS, st.lists(st.integers(0, 2**64), max_size=4))
def test_stream_seeds_fit_every_generator_and_depend_on_every_number(seed: int, numbers: list[int]) -> None:
    found = order.stream_seed(seed, *numbers)
    assert 0 <= found < 2**63
    assert found != order.stream_seed(seed, *numbers, 0)
    assert found != order.stream_seed(seed + 1, *numbers)
