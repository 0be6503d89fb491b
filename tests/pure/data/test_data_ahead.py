"""The background thread: bounded, in order, and it ends."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from shardwise.data.ahead import BURST, BURST_BYTES, Ahead
from shardwise.errors import DataError


def ahead(source: Iterator[int], depth: int = 2, timeout_s: float = 10) -> Ahead[int]:
    return Ahead(lambda stop: source, depth=depth, timeout_s=timeout_s, awaited=lambda: "step 3")


def counted(made: list[int], count: int) -> Iterator[int]:
    """The numbers to `count`; `made` has those that were asked for."""
    for number in range(count):
        made.append(number)
        yield number


def until(condition: object, limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shardwise-data"]


def test_items_come_in_order_and_no_more_than_depth_are_made_early() -> None:
    made: list[int] = []
    found = ahead(counted(made, 20), depth=3)
    until(lambda: len(made) == 4)  # three in the queue, one in hand
    time.sleep(0.05)
    assert len(made) == 4
    assert list(found) == list(range(20))
    until(lambda: not threads())


def test_small_items_are_made_in_bursts() -> None:
    made: list[int] = []
    found = Ahead(lambda stop: counted(made, 40), depth=2, timeout_s=10, awaited=lambda: "", nbytes=lambda _: 100)
    until(lambda: len(made) == BURST + 1)  # those on the shelf, and one in hand
    for number in range(BURST - 2):
        assert next(found) == number
    time.sleep(0.05)
    assert len(made) == BURST + 1  # two are left: nobody was woken
    assert next(found) == BURST - 2
    until(lambda: len(made) == 2 * BURST)  # and then as many again
    assert list(found) == list(range(BURST - 1, 40))


def test_large_items_are_not() -> None:
    made: list[int] = []
    found = Ahead(
        lambda stop: counted(made, 40), depth=2, timeout_s=10, awaited=lambda: "", nbytes=lambda _: BURST_BYTES
    )
    until(lambda: len(made) == 3)
    time.sleep(0.05)
    assert len(made) == 3
    assert list(found) == list(range(40))


def test_an_exception_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise DataError("sample 2 is bad")

    found = ahead(source())
    assert next(found) == 1
    with pytest.raises(DataError, match="sample 2 is bad"):
        next(found)
    with pytest.raises(StopIteration):
        next(found)


def test_closing_ends_the_thread_and_the_source() -> None:
    ended = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.set()

    found = ahead(source())
    next(found)
    found.close()
    assert ended.is_set()
    assert not threads()
    found.close()


def test_dropping_the_reader_ends_the_thread() -> None:
    found = ahead(iter(range(10**9)))
    next(found)
    del found
    gc.collect()
    until(lambda: not threads())


def test_waiting_has_a_limit_and_names_what_it_waits_for() -> None:
    release = threading.Event()

    def source() -> Iterator[int]:
        release.wait(20)
        yield 0

    found = ahead(source(), timeout_s=0.05)
    threading.Timer(0.2, release.set).start()
    with pytest.raises(DataError, match="No data came within 0 s while waiting for step 3"):
        next(found)
