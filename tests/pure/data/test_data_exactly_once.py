"""Runs that stop and resume on other numbers of ranks: every sample once an epoch, the same ones in each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data.datasets import dataset
from shardwise.data.loader import eval_batches, open_batches
from shardwise.data.order import sample_index, stream_seed
from shardwise.errors import DataError
from tests.examples import examples


class Numbers:
    """Sample i is the number i; a batch is its list of (number, seed)."""

    user_code = False
    weight_hint = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> list[tuple[int, int]]:
        return list(zip(indices, seeds, strict=True))


class Endless:
    """An iterable data set of the numbers below `count`, again in each epoch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


STRETCHES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5)  # (ranks, steps)
SHARDS = st.one_of(st.none(), st.integers(1, 6))


def run(samples: Any, stretches: list[tuple[int, int]], batch: int, seed: int, **how: Any) -> list[list[Any]]:
    """Each step's samples over all ranks of its stretch, as (sample, what its batch holds)."""
    log: list[list[Any]] = []
    for ranks, steps in stretches:
        start = len(log)
        log += [[] for _ in range(steps)]
        for rank in range(ranks):
            with open_batches(
                samples, global_batch=batch, seed=seed, rank=rank, ranks=ranks, start_step=start, **how
            ) as batches:
                for _ in range(steps):
                    local = next(batches)
                    for micro in local.micro:
                        assert len(micro.samples) == len(micro.batch) > 0
                        log[local.step] += list(zip(micro.samples, micro.batch, strict=True))
                assert batches.state == {"step": start + steps}
    return log


@examples(60)
@given(st.integers(1, 40), st.integers(1, 13), st.integers(0, 99), STRETCHES, SHARDS, st.integers(1, 3))
def test_each_epoch_has_every_sample_once_whatever_the_ranks(
    count: int, batch: int, seed: int, stretches: list[tuple[int, int]], shards: int | None, microbatches: int
) -> None:
    how = {"logical_shards": shards, "microbatches": microbatches}
    log = run(Numbers(count), stretches, batch, seed, **how)
    seen = [sample for step in log for sample, _ in step]
    whole = len(seen) // count * count
    for start in range(0, whole, count):
        assert sorted(seen[start : start + count]) == list(range(count))
    assert max(Counter(seen[whole:]).values(), default=1) == 1
    # The oracle: which sample, with which seed, follows from the seed and the position alone.
    positions = [[step * batch + i for i in range(batch)] for step in range(len(log))]
    assert log == [
        [(found := sample_index(p, count, seed), (found, stream_seed(seed, p))) for p in step] for step in positions
    ]


@examples(40)
@given(st.integers(1, 25), st.integers(1, 9), STRETCHES, SHARDS)
def test_an_iterable_gives_every_sample_once_an_epoch_whatever_the_ranks(
    count: int, batch: int, stretches: list[tuple[int, int]], shards: int | None
) -> None:
    prepared = dataset(Endless(count), collate=list).prepare(None, seed=0)  # type: ignore[arg-type]
    log = run(prepared.train, stretches, batch, 3, logical_shards=shards)
    assert log == [[(p % count, p % count) for p in range(s * batch, (s + 1) * batch)] for s in range(len(log))]


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_sees_every_sample_once_over_all_ranks(count: int, batch: int, ranks: int) -> None:
    for samples in (Numbers(count), *([] if not count else [Endless(count)])):
        opened: Any = samples
        if isinstance(samples, Endless):
            opened = dataset(samples, collate=list).prepare(None, seed=0).train  # type: ignore[arg-type]
        found = [one for rank in range(ranks) for one in eval_batches(opened, batch=batch, rank=rank, ranks=ranks)]
        assert max(map(len, found), default=0) <= batch
        seen = [item[0] if isinstance(item, tuple) else item for one in found for item in one]
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_logical_shards_have_the_same_streams_on_any_number_of_ranks(ranks: int) -> None:
    found = {}
    for rank in range(ranks):
        with open_batches(
            Numbers(50), global_batch=10, seed=4, rank=rank, ranks=ranks, logical_shards=4, steps=3
        ) as batches:
            for local in batches:
                for micro in local.micro:
                    found[local.step, micro.shard] = (micro.stream, micro.samples)
    assert set(found) == {(step, shard) for step in range(3) for shard in range(4)}
    assert len({stream for stream, _ in found.values()}) == 12
    assert all(stream == stream_seed(4, step, shard, 0) for (step, shard), (stream, _) in found.items())


def test_a_rank_without_a_share_still_steps() -> None:
    with open_batches(Numbers(5), global_batch=2, seed=0, rank=3, ranks=4, steps=3) as batches:
        assert [(local.step, local.micro) for local in batches] == [(0, []), (1, []), (2, [])]


def test_microbatches_are_nearly_equal_and_no_more_than_samples() -> None:
    with open_batches(Numbers(99), global_batch=7, seed=0, rank=0, ranks=1, microbatches=3) as batches:
        assert [len(micro.samples) for micro in next(batches).micro] == [3, 2, 2]
    with open_batches(Numbers(99), global_batch=2, seed=0, rank=0, ranks=1, microbatches=3) as batches:
        assert [len(micro.samples) for micro in next(batches).micro] == [1, 1]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        open_batches(Numbers(0), global_batch=2, seed=0, rank=0, ranks=1)
