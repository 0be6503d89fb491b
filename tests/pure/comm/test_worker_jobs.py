"""Jobs of a worker thread: what one that failed leaves behind for those who wait."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from shardwise.comm.worker import Worker


def boom() -> None:
    raise RuntimeError("the link broke")


def test_who_asked_to_be_told_knows_of_a_failure_before_anybody_who_waits() -> None:
    told: list[str] = []

    def failed(error: Exception) -> None:
        time.sleep(0.05)
        told.append(str(error))

    worker = Worker("test", failed)
    first, second = worker.submit(boom), worker.submit(lambda: None)
    with pytest.raises(RuntimeError, match="the link broke"):
        first.wait(timedelta(seconds=5))
    assert told == ["the link broke"]
    with pytest.raises(RuntimeError, match="the link broke"):
        second.wait(timedelta(seconds=5))
    assert told == ["the link broke"], "told once"
    worker.stop(5)


def test_whoever_waits_is_woken_even_if_telling_fails() -> None:
    def failed(error: Exception) -> None:
        raise ValueError("not now")

    worker = Worker("test", failed)
    with pytest.raises(RuntimeError, match="the link broke"):
        worker.submit(boom).wait(timedelta(seconds=5))
    worker.stop(5)
