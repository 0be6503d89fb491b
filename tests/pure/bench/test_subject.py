from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.launched import Launched
from bench.rounds import Lost
from bench.subject import Subject

FAKE = Path(__file__).with_name("fake_subject.py")
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")


@contextmanager
def fake(behaviour: str, ranks: int = 2) -> Iterator[Subject]:
    subject = Subject("fake", [sys.executable, str(FAKE), str(ranks), behaviour], ranks=ranks, env={})
    try:
        yield subject
    finally:
        subject.close(grace_s=2.0)


def test_ranks_answer_in_rank_order_and_time_every_step() -> None:
    with fake("even") as subject:
        subject.start(20.0)
        first, second = subject.run(3, 10.0)
        assert first["losses"] == [10.0, 9.0, 8.0]
        assert second["losses"] == [11.0, 10.0, 9.0]
        assert len(first["seconds"]) == 3
        assert min(first["seconds"]) >= 0.001
        assert subject.run(1, 10.0)[0]["losses"] == [7.0]
        assert subject.checksums(10.0) == [4.0, 4.0]
        assert subject.facts == {"kind": "even"}


def test_a_subject_ends_by_itself_when_told() -> None:
    with fake("even") as subject:
        subject.start(20.0)
        pids = subject.launched.pids()
        subject.dismiss()
        assert subject.launched.wait(10.0)
        assert subject.launched.status == 0
    assert not [pid for pid in pids if alive(pid)]


def test_a_hang_is_lost_after_the_deadline_and_killed() -> None:
    with fake("hang:2") as subject:
        subject.start(20.0)
        subject.run(2, 10.0)
        began = time.monotonic()
        with pytest.raises(Lost, match="hung: no answer within 0 s"):
            subject.run(1, 0.3)
        assert time.monotonic() - began < 3.0
        pids = subject.launched.pids()
        subject.close(grace_s=0.0)
    assert not [pid for pid in pids if alive(pid)]


def test_a_death_is_lost_at_once_with_what_it_said() -> None:
    with fake("die:1") as subject:
        subject.start(20.0)
        with pytest.raises(Lost, match="died; .*out of luck"):
            subject.run(2, 10.0)


def test_ranks_that_never_connect_are_lost() -> None:
    with fake("mute") as subject:
        with pytest.raises(Lost, match="hung: 0 of 2 ranks after 1 s"):
            subject.start(0.6)
        subject.close(grace_s=0.0)


def test_a_command_that_fails_is_lost_with_its_last_words() -> None:
    subject = Subject("bad", [sys.executable, "-c", "raise SystemExit('no such peer')"], ranks=2, env={})
    with pytest.raises(Lost, match="ended with status 1 before it was ready; no such peer"):
        subject.start(20.0)
    subject.close()


@linux
def test_a_process_that_left_the_group_is_found_and_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with fake(f"escape:{note}", ranks=1) as subject:
        subject.start(20.0)
        until(lambda: note.exists() and bool(note.read_text()))
        escaped = int(note.read_text())
        assert escaped in subject.launched.pids()
    assert not alive(escaped)


@linux
def test_a_frozen_system_does_nothing_until_it_is_thawed(tmp_path: Path) -> None:
    """A process that left the group too: daemons beat their hearts while others have their turn."""
    ticks = tmp_path / "ticks"
    code = (
        "import os, sys, time\n"
        "if os.fork(): time.sleep(60)\n"
        "os.setsid()\n"
        "while True:\n"
        "    with open(sys.argv[1], 'a') as file: file.write('.')\n"
        "    time.sleep(0.01)\n"
    )
    launched = Launched([sys.executable, "-c", code, str(ticks)], env={}, folder=tmp_path)
    launched.start()
    until(lambda: ticks.exists() and ticks.stat().st_size > 2)
    launched.freeze()
    time.sleep(0.1)
    frozen = ticks.stat().st_size
    time.sleep(0.2)
    assert ticks.stat().st_size == frozen
    launched.thaw()
    until(lambda: ticks.stat().st_size > frozen)
    launched.freeze()
    pids = launched.pids()
    launched.close(grace_s=0.0)
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


def until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
