"""Batches for one rank, made ahead of the step that needs them; the position is nothing but the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from shardwise.data import schedule
from shardwise.data.ahead import Ahead
from shardwise.data.samples import Samples, Stream
from shardwise.data.schedule import StepTasks, Task
from shardwise.data.seeding import untouched_generators
from shardwise.data.workers import in_workers
from shardwise.errors import DataError

TIMEOUT_S = 600.0
PREFETCH = 2  # steps made ahead
UNKNOWN, PAGE = 1 << 40, 4096  # bytes
T = TypeVar("T")
Made = tuple[Any, list[int]]


@dataclass(slots=True)
class Micro:
    """One micro-batch: the collated batch, the seed of its random stream, its samples' indices, its logical shard."""

    batch: Any
    stream: int
    samples: list[int]
    shard: int | None


@dataclass(slots=True)
class LocalStep:
    """This rank's part of `step`; `wait_s` is how long the caller stood waiting for it, in seconds."""

    step: int
    micro: list[Micro]
    wait_s: float


class Batches:
    """An iterator of LocalStep; `state` is what a checkpoint keeps of it. Close it, or use it in a `with`."""

    def __init__(self, steps: Iterator[LocalStep], start_step: int) -> None:
        self._steps = steps
        self.step = start_step

    @property
    def state(self) -> dict[str, int]:
        """`{"step": the next step}`: give it to `open_batches(start_step=...)` on any number of ranks."""
        return {"step": self.step}

    def __iter__(self) -> Iterator[LocalStep]:
        return self

    def __next__(self) -> LocalStep:
        began = time.perf_counter()
        found = next(self._steps)
        found.wait_s = time.perf_counter() - began
        self.step = found.step + 1
        return found

    def close(self) -> None:
        """Stop making batches; idempotent."""
        _close(self._steps)

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_batches(
    samples: Samples | Stream,
    *,
    global_batch: int,
    seed: int,
    rank: int,
    ranks: int,
    start_step: int = 0,
    steps: int | None = None,
    logical_shards: int | None = None,
    microbatches: int = 1,
    workers: int = 0,
    prefetch: int = PREFETCH,
    timeout_s: float = TIMEOUT_S,
    share: Callable[[int], range] | None = None,
) -> Batches:
    """This rank's batches of the steps `start_step` ... `steps` - 1 (without end when None).

    Which samples a step has depends on `seed` and the step alone. With `logical_shards` (exact mode) there is one
    micro-batch for each owned shard, else the rank's slice in `microbatches` pieces. Up to `prefetch` steps are made
    ahead, small ones up to 16: in a thread, or in `workers` processes, in which the user's code runs. With workers=0
    it runs in the caller's thread when its step comes, since it may draw from the process's random generators. `share`
    says of each step, in order and from the thread that makes it, which of its samples this rank computes instead of
    its slice; with `workers` at least one.
    Raises DataError, here or from the iterator, which names the sample.
    """
    number = None if isinstance(samples, Stream) else len(samples)
    if number == 0:
        raise DataError("The data set to train on has no samples. Check how it is built.")
    cuts = schedule.cuts_of(global_batch, rank, ranks, logical_shards, microbatches)
    todo = schedule.tasks(
        cuts,
        samples=number,
        global_batch=global_batch,
        seed=seed,
        rank=rank,
        start_step=start_step,
        steps=steps,
    )
    if share is not None:
        todo = schedule.shared_tasks(
            share,
            samples=number,
            global_batch=global_batch,
            seed=seed,
            rank=rank,
            ranks=ranks,
            microbatches=microbatches,
            start_step=start_step,
            steps=steps,
        )
    made = _maker(samples, todo, workers if cuts else 0, prefetch * max(1, len(cuts)), seed, _local_step)
    inline = samples.user_code and not workers
    nbytes = _nbytes if share is None else None  # shares are dealt when a step is made: not long before it is computed
    return Batches(_ahead(made, inline=inline, prefetch=prefetch, timeout_s=timeout_s, nbytes=nbytes), start_step)


def eval_batches(
    samples: Samples | Stream,
    *,
    batch: int,
    rank: int,
    ranks: int,
    workers: int = 0,
    prefetch: int = PREFETCH,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Any]:
    """Batches in which every sample occurs exactly once over all ranks; ranks may get different numbers of them.

    `batch` is the number of samples of a round over all ranks, so that what is in a round does not depend on them.
    Random transforms see a seed that depends on the sample alone, so evaluating twice gives the same. Raises DataError.
    """
    if isinstance(samples, Stream):
        yield from _each_untouched(samples.once(-(-batch // ranks), ranks, rank), samples.user_code)
        return
    todo = schedule.passes(len(samples), batch=batch, rank=rank, ranks=ranks)
    made = _maker(samples, todo, workers, prefetch, 0, _only_batch)
    found = _ahead(made, inline=samples.user_code and not workers, prefetch=prefetch, timeout_s=timeout_s)
    try:
        yield from found
    finally:
        _close(found)


def _maker(
    samples: Samples | Stream,
    todo: Iterator[StepTasks],
    workers: int,
    ahead: int,
    seed: int,
    gather: Callable[[StepTasks, list[Made]], T],
) -> Callable[[threading.Event], Iterator[T]]:
    """What starts making steps: in worker processes, or in the thread that iterates."""

    def here(_stop: threading.Event) -> Iterator[T]:
        return (gather(step, [_make(samples, task, seed) for task in step.tasks]) for step in todo)

    def elsewhere(stop: threading.Event) -> Iterator[T]:
        # A stream can only be read in order, so a second process would do nothing but read it again.
        return in_workers(samples, todo, 1 if isinstance(samples, Stream) else workers, ahead, seed, gather, stop)

    return elsewhere if workers else here


def _ahead(
    made: Callable[[threading.Event], Iterator[T]], *, inline: bool, prefetch: int, timeout_s: float, nbytes: Any = None
) -> Iterator[T]:
    if inline:
        return made(threading.Event())
    return Ahead(made, depth=prefetch, timeout_s=timeout_s, awaited=lambda: "the next batch", nbytes=nbytes)


def _nbytes(step: LocalStep) -> int:
    """The bytes of a step's tensors; very many where anything else is among them."""
    return sum(_size(micro.batch) for micro in step.micro)


def _size(batch: Any) -> int:
    """Of memory that a batch holds on to; of a small tensor a page, since each from a worker process has its own."""
    import torch

    if isinstance(batch, Mapping):
        return sum(map(_size, batch.values()))
    if isinstance(batch, list | tuple):
        return sum(map(_size, batch))
    if isinstance(batch, torch.Tensor) and batch.layout == torch.strided:
        return max(PAGE, batch.untyped_storage().nbytes())
    return UNKNOWN


def _make(samples: Samples | Stream, task: Task, seed: int) -> Made:
    with untouched_generators(samples.user_code):
        if isinstance(samples, Stream):
            return samples.read(task.indices, seed)
        return samples.batch(task.indices, task.seeds), task.indices


def _local_step(step: StepTasks, made: list[Made]) -> LocalStep:
    micro = [
        Micro(batch=batch, stream=task.stream, samples=found, shard=task.shard)
        for task, (batch, found) in zip(step.tasks, made, strict=True)
    ]
    return LocalStep(step=step.step, micro=micro, wait_s=0.0)


def _only_batch(step: StepTasks, made: list[Made]) -> Any:
    return made[0][0]


def _each_untouched(items: Iterator[T], active: bool) -> Iterator[T]:
    while True:
        with untouched_generators(active):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _close(made: Iterator[Any]) -> None:
    close = getattr(made, "close", None)
    if close is not None:
        close()
