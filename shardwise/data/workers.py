"""Worker processes that make micro-batches: decoding, transforms and the user's own data sets, in parallel."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from shardwise.data.samples import Samples, Stream
from shardwise.data.schedule import StepTasks, Task
from shardwise.errors import DataError

T = TypeVar("T")
_POLL_S = 0.2


class _Failure(NamedTuple):
    """What a worker sends instead of a batch: a message for the user, or the traceback of a bug."""

    message: str
    bug: bool


class _Marked:
    """Seeds that write down, as each is taken, which sample its worker has come to: the last words of a killed one."""

    def __init__(self, indices: list[int], seeds: list[int], marks: Any, slot: int) -> None:
        self._indices, self._seeds, self._marks, self._slot = indices, seeds, marks, slot

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, at: int) -> int:
        seed = self._seeds[at]
        self._marks[self._slot] = self._indices[at]
        return seed


class _TaskSet:
    """The map-style data set that torch's DataLoader hands tasks to, in a worker."""

    def __init__(self, samples: Samples | Stream, seed: int, marks: Any) -> None:
        self.samples, self.seed, self.marks = samples, seed, marks

    def __getitem__(self, task: Task) -> tuple[Any, list[int]] | _Failure:
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        slot = 2 * (info.id if info else 0)
        self.marks[slot] = os.getpid()
        self.marks[slot + 1] = task.indices[0]
        try:
            if isinstance(self.samples, Stream):
                return self.samples.read(task.indices, self.seed)
            seeds: Any = _Marked(task.indices, task.seeds, self.marks, slot + 1)
            return self.samples.batch(task.indices, seeds), task.indices
        except DataError as error:
            return _Failure(str(error), False)
        except Exception:
            return _Failure(traceback.format_exc(), True)


class _Feed:
    """The DataLoader's sampler: hands tasks out in order and remembers how they group into steps."""

    def __init__(self, todo: Iterator[StepTasks]) -> None:
        self._todo = todo
        self.started: deque[StepTasks] = deque()

    def __iter__(self) -> Iterator[Task]:
        for step in self._todo:
            self.started.append(step)
            yield from step.tasks


def in_workers(
    samples: Samples | Stream,
    todo: Iterator[StepTasks],
    workers: int,
    ahead: int,
    seed: int,
    gather: Callable[[StepTasks, list[tuple[Any, list[int]]]], T],
    stop: threading.Event,
) -> Iterator[T]:
    """Each step's tasks (every step has some), gathered in order, made at most about `ahead` tasks early.

    Call and iterate in one thread that is not the main one: only then does torch install no signal handler. Ends soon
    after `stop` is set. Raises DataError when a sample fails or a worker dies, naming the sample.
    """
    from torch import Generator
    from torch.utils.data import DataLoader

    how = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    context = multiprocessing.get_context(how)
    marks = context.RawArray("q", 2 * workers)
    feed = _Feed(todo)
    loader: Any = DataLoader(
        _TaskSet(samples, seed, marks),  # type: ignore[arg-type]
        sampler=feed,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(1, -(-ahead // workers)),
        multiprocessing_context=context,
        worker_init_fn=_begin,
        collate_fn=_as_it_is,
        generator=Generator(),  # else starting it would draw from the process's generator
        timeout=_POLL_S,
    )
    made = iter(loader)
    try:
        while (first := _next(made, marks, stop)) is not None:
            step = feed.started.popleft()
            rest = [_next(made, marks, stop) for _ in step.tasks[1:]]
            if None in rest:
                break
            yield gather(step, [first, *[one for one in rest if one is not None]])
    finally:
        _end(made)


def _next(made: Iterator[Any], marks: Any, stop: threading.Event) -> tuple[Any, list[int]] | None:
    """The next finished task; None at the end, or when told to stop."""
    while not stop.is_set():
        try:
            found = next(made, None)
        except RuntimeError as error:
            if "timed out" in str(error):  # nothing is lost: the next call goes on waiting
                continue
            raise _died(error, marks) from error
        if isinstance(found, _Failure):
            if found.bug:
                raise RuntimeError(f"A data worker failed:\n{found.message}")
            raise DataError(found.message)
        return found
    return None


def _end(made: Any) -> None:
    """Kill the workers and let torch clear up after them, now and in this thread.

    Their work is read-only, and asking politely takes seconds when one hangs. All of them at once, since one that
    dies while it holds the lock of the common queue leaves the others waiting. These are private names of torch's
    iterator; without them its garbage collection does the same, later.
    """
    for worker in getattr(made, "_workers", ()):
        worker.kill()
    shut_down = getattr(made, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _died(error: RuntimeError, marks: Sequence[int]) -> DataError:
    pids = {int(number) for number in re.findall(r"\d+", str(error))}
    at = [marks[slot + 1] for slot in range(0, len(marks), 2) if marks[slot] in pids]
    where = f"while it made sample {', '.join(map(str, at))}" if at else "before its first sample"
    return DataError(
        f"A data worker process died {where}: {str(error).strip()} Often the machine ran out of memory (use fewer "
        "workers), or the data set's code crashed (try that sample by hand, with workers=0)."
    )


def _begin(worker: int) -> None:
    """A killed rank takes its workers along at once, and a worker leaves Ctrl-C to the rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _as_it_is(made: Any) -> Any:
    return made
