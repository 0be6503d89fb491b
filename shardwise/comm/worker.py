"""`Worker`: a thread that runs what it is given, one thing after the other; the work of such a thing."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

FOREVER = timedelta(days=365)  # whoever waits for the job has a limit


class Job:
    """Something a `Worker` runs. `results` are what `torch.distributed` hands to its caller."""

    def __init__(self, call: Callable[[], None], results: list[Any]) -> None:
        self._call: Callable[[], None] | None = call
        self._results = results
        self._ended = threading.Lock()  # held until it has ended: this wakes a waiter with one call of the system
        self._ended.acquire()
        self._done = False
        self._failure: Exception | None = None

    def run(
        self, failure: Exception | None, failed: Callable[[Exception], None] = lambda error: None
    ) -> Exception | None:
        """Run it, unless there was a failure before; the failure, if any.

        `failed(error)` is called at a new one, before whoever waits is woken: else the two would race to say why.
        """
        try:
            if failure is not None:
                raise failure
            assert self._call is not None
            self._call()
        except Exception as error:  # it belongs to whoever waits
            self._failure = error
            if failure is None:
                with contextlib.suppress(Exception):  # whoever waits is woken whatever comes of it
                    failed(error)
        self._call = None  # and with it the tensors
        self._done = True
        self._ended.release()
        return self._failure

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until it has ended. Raises what it raised, RuntimeError after `timeout`."""
        if not self._ended.acquire(timeout=timeout.total_seconds() if timeout else -1):
            raise RuntimeError("the operation has not ended")
        self._ended.release()
        if self._failure is not None:
            raise self._failure
        return True

    def is_completed(self) -> bool:
        return self._done

    def is_success(self) -> bool:
        return self.is_completed() and self._failure is None

    def exception(self) -> Exception | None:
        return self._failure

    def result(self) -> list[Any]:
        return self._results

    def _source_rank(self) -> int:
        return -1


class Unhurried:
    """Work of a message over gloo, whose own wait must not run out: then gloo closes all its connections.

    A thread waits for it, as long as it takes, from the first time that somebody else does. Of a reduce-scatter too,
    whose work never says that it has ended.
    """

    def __init__(self, work: Any, results: list[Any]) -> None:
        self._work = work
        self._job = Job(lambda: work.wait(FOREVER) and None, results)
        self._begun = threading.Lock()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """As a `Job`'s."""
        self._begin()
        return self._job.wait(timeout)

    def is_completed(self) -> bool:
        self._begin()
        return self._job.is_completed()

    def is_success(self) -> bool:
        return self._job.is_success()

    def exception(self) -> Exception | None:
        return self._job.exception()

    def result(self) -> list[Any]:
        return self._job.result()

    def _source_rank(self) -> int:
        return int(self._work._source_rank())

    def _begin(self) -> None:
        if self._begun.acquire(blocking=False):
            threading.Thread(target=self._job.run, args=(None,), name="message", daemon=True).start()


class Worker:
    """Runs jobs in the order in which they were given. After one has failed all others fail with the same error.

    `failed(error)` is called once, on the thread, at the first failure and before anybody sees it.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None] = lambda error: None) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._failed = failed
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None], results: list[Any] | None = None) -> Job:
        job = Job(call, results or [])
        self._jobs.put(job)
        return job

    def stop(self, limit_s: float) -> None:
        """End the thread after what it was given so far; wait at most `limit_s` seconds for that."""
        self._jobs.put(None)
        self.join(limit_s)

    def join(self, limit_s: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(limit_s)

    def _work(self) -> None:
        failure: Exception | None = None
        with torch.inference_mode():  # there tensors of either mode may be written to
            while True:
                job = self._jobs.get()
                if job is None:
                    return
                failure = job.run(failure, self._failed)
                del job
