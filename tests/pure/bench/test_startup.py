from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench import stamp
from bench.launched import Launched
from bench.rounds import Lost
from bench.startup import to_exit, to_stamp

TWO_RANKS = """
import os, sys, time
from bench.stamp import stamp
for rank in range(2):
    time.sleep(0.1)
    stamp(rank)
time.sleep(float(sys.argv[1]))
"""


def launched(tmp_path: Path, *command: str) -> Launched:
    return Launched([sys.executable, "-c", *command], env={stamp.STAMP: str(tmp_path / "stamp")}, folder=tmp_path)


def test_the_time_ends_at_the_last_stamp_not_at_the_end_of_the_process(tmp_path: Path) -> None:
    began = time.monotonic()
    seconds = to_stamp(launched(tmp_path, TWO_RANKS, "1"), tmp_path / "stamp", 2, 20.0)
    assert 0.2 <= seconds < time.monotonic() - began - 0.9


def test_stamps_of_an_earlier_launch_are_not_taken(tmp_path: Path) -> None:
    to_stamp(launched(tmp_path, TWO_RANKS, "0"), tmp_path / "stamp", 2, 20.0)
    with pytest.raises(Lost, match="ended with status 3; sorry"):
        to_stamp(launched(tmp_path, "print('sorry'); raise SystemExit(3)"), tmp_path / "stamp", 2, 20.0)


def test_no_step_before_the_deadline_is_a_hang(tmp_path: Path) -> None:
    silent = launched(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(Lost, match="hung: no step within 0 s"):
        to_stamp(silent, tmp_path / "stamp", 2, 0.3)
    assert silent.pids() == []


def test_one_stamp_of_two_is_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "stamp-0").write_text("1.0")
    assert stamp.read(tmp_path / "stamp", 2) is None
    (tmp_path / "stamp-1").write_text("3.0")
    assert stamp.read(tmp_path / "stamp", 2) == 3.0


def test_a_command_is_timed_to_its_end(tmp_path: Path) -> None:
    assert 0.25 <= to_exit(launched(tmp_path, "import time; time.sleep(0.25)"), 20.0) < 5.0
    with pytest.raises(Lost, match="ended with status 2; bad option"):
        to_exit(launched(tmp_path, "print('bad option'); raise SystemExit(2)"), 20.0)
    with pytest.raises(Lost, match="hung: no end within 0 s"):
        to_exit(launched(tmp_path, "import time; time.sleep(60)"), 0.2)


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="POSIX only")
def test_the_wait_ends_when_the_process_does(tmp_path: Path) -> None:
    """Not at the next tick of a poll: 20 short processes take about their own time each."""
    process = launched(tmp_path, "import time; time.sleep(0.3); print(time.monotonic())")
    process.start()
    assert process.wait(20.0)
    late = time.monotonic() - float(process.log.read_text())
    process.close()
    assert late < 0.2
