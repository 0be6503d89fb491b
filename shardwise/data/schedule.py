"""What one rank has to make for each step: which samples, cut into which micro-batches, with which seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from shardwise.data import order

_POSITIONS_AHEAD = 8192


class Cut(NamedTuple):
    """One micro-batch as positions within a step; `shard` is its logical shard, None outside exact mode."""

    positions: range
    shard: int | None


class Task(NamedTuple):
    """One micro-batch to make. `indices` are positions of the run when the samples are a stream."""

    step: int
    number: int
    indices: list[int]
    seeds: list[int]
    shard: int | None
    stream: int


class StepTasks(NamedTuple):
    """What a rank makes for one step; no tasks where the rank has no part in it."""

    step: int
    tasks: list[Task]


def cuts_of(global_batch: int, rank: int, ranks: int, logical_shards: int | None, microbatches: int) -> list[Cut]:
    """The micro-batches of `rank` in every step, none of them empty.

    With `logical_shards`, one for each shard that the rank owns; else its slice in `microbatches` pieces whose sizes
    differ by at most 1, fewer when the slice has fewer samples.
    """
    if logical_shards is not None:
        shards = order.shard_slices(global_batch, logical_shards)
        owned = order.shards_of(rank, ranks, logical_shards)
        return [Cut(shards[shard], shard) for shard in owned if shards[shard]]
    mine = order.rank_slice(global_batch, ranks, rank)
    pieces = order.shard_slices(len(mine), min(microbatches, len(mine))) if mine else []
    return [Cut(range(mine.start + piece.start, mine.start + piece.stop), None) for piece in pieces]


def shared_tasks(
    share: Callable[[int], range],
    *,
    samples: int | None,
    global_batch: int,
    seed: int,
    rank: int,
    ranks: int,
    microbatches: int,
    start_step: int,
    steps: int | None,
) -> Iterator[StepTasks]:
    """The tasks of each step where `share(step)` says which of its samples this rank computes.

    No micro-batch is larger than those of equal shares, in `microbatches` pieces, would be.
    """
    largest = -(-global_batch // (ranks * microbatches))
    step = start_step
    while steps is None or step < steps:
        mine = share(step)
        pieces = order.shard_slices(len(mine), max(microbatches, -(-len(mine) // largest)))
        cuts = [Cut(range(mine.start + piece.start, mine.start + piece.stop), None) for piece in pieces if piece]
        yield from tasks(
            cuts, samples=samples, global_batch=global_batch, seed=seed, rank=rank, start_step=step, steps=step + 1
        )
        step += 1


def tasks(
    cuts: list[Cut], *, samples: int | None, global_batch: int, seed: int, rank: int, start_step: int, steps: int | None
) -> Iterator[StepTasks]:
    """The tasks of each step from `start_step` up to, not including, `steps` (for ever when None).

    `samples` is the number of samples; None for a stream, whose order is its own.
    """
    first = cuts[0].positions.start if cuts else 0
    width = cuts[-1].positions.stop - first if cuts else 0
    at_once = max(1, _POSITIONS_AHEAD // max(1, width))
    step = start_step
    while steps is None or step < steps:
        count = at_once if steps is None else min(at_once, steps - step)
        start = np.arange(step, step + count, dtype=np.int64) * global_batch + first
        positions = start[:, None] + np.arange(width, dtype=np.int64)
        indices = positions if samples is None else order.sample_indices(positions, samples, seed)
        seeds = order.stream_seeds(seed, positions)
        for row in range(count):
            made = [
                Task(
                    step=step + row,
                    number=number,
                    indices=indices[row, cut.positions.start - first : cut.positions.stop - first].tolist(),
                    seeds=seeds[row, cut.positions.start - first : cut.positions.stop - first].tolist(),
                    shard=cut.shard,
                    stream=_stream(seed, step + row, rank, number, cut.shard),
                )
                for number, cut in enumerate(cuts)
            ]
            yield StepTasks(step + row, made)
        step += count


def _stream(seed: int, step: int, rank: int, number: int, shard: int | None) -> int:
    """A logical shard's stream is its own: neither the rank that owns it nor its place there may show."""
    return order.stream_seed(seed, step, rank, number) if shard is None else order.stream_seed(seed, step, shard, 0)


def passes(samples: int, *, batch: int, rank: int, ranks: int) -> Iterator[StepTasks]:
    """One pass over all samples in rounds of `batch`: this rank's share of each, where it has one."""
    for step, start in enumerate(range(0, samples, batch)):
        mine = order.rank_slice(min(batch, samples - start), ranks, rank)
        indices = list(range(start + mine.start, start + mine.stop))
        if indices:
            seeds = order.stream_seeds(0, indices).tolist()
            yield StepTasks(step, [Task(step, 0, indices, seeds, None, 0)])
