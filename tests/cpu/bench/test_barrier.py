"""The bare barrier of `data_parallel`."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from bench.subjects import unsynchronised
from bench.subjects.unsynchronised import Barrier


@pytest.mark.parametrize("world", [2, 3])
def test_nobody_passes_the_barrier_before_the_last_one_is_there(tmp_path: Path, world: int) -> None:
    times = 50
    arrived = [0] * world
    early: list[str] = []

    def rank(number: int) -> None:
        barrier = Barrier(tmp_path, number, world)
        for at in range(1, times + 1):
            time.sleep(0.0005 * ((at + number) % world))  # another one is last each time
            arrived[number] = at
            barrier.meet()
            if min(arrived) < at:
                early.append(f"rank {number} passed barrier {at} when {arrived} had arrived")

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert arrived == [times] * world
    assert not early


def test_a_barrier_at_which_a_rank_is_missing_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsynchronised, "LIMIT_S", 0.05)
    with pytest.raises(TimeoutError, match="another rank did not come to the barrier within"):
        Barrier(tmp_path, 0, 2).meet()


def test_one_rank_meets_nobody(tmp_path: Path) -> None:
    Barrier(tmp_path, 0, 1).meet()
    assert os.listdir(tmp_path) == []
