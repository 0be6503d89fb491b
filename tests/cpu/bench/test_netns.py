"""Wires between namespaces: as slow and as long as asked, and gone afterwards. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.netns import ENDS, PREFIX, SPACES, Link, Wire, remove_stale, run, unavailable
from bench.rounds import Lost

ROOT = Path(__file__).resolve().parents[3]
WHY = unavailable(Wire(100, 10))
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))

HELD = """
import subprocess, sys, time
from bench.netns import Link, Wire
with Link(Wire(100, 10)) as link:
    command = [*link.inside(1), "sh", "-c", "echo inside; exec sleep 100"]
    inside = subprocess.Popen(command, stdout=subprocess.PIPE)
    inside.stdout.readline()
    print(link.prefix, inside.pid, flush=True)
    time.sleep(100)
"""


def alive(pid: str) -> bool:
    """A process that nobody waits for stays listed as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def spaces(prefix: str) -> list[str]:
    return [path.name for path in SPACES.glob(f"{prefix}*")]


@pytest.mark.parametrize("wire", [Wire(10), Wire(100, 10)], ids=str)
def test_a_wire_carries_what_its_name_says(wire: Wire) -> None:
    with Link(wire) as link:
        found = link.measure(1.5)
        assert len(spaces(link.prefix)) == 2
    assert wire.rate_mbit is not None
    assert 0.85 * wire.rate_mbit < found.mbit_per_s < 1.02 * wire.rate_mbit
    assert found.round_trip_ms >= 2 * wire.delay_ms
    assert spaces(link.prefix) == []


def test_the_ends_reach_each_other_and_nothing_else() -> None:
    with Link(Wire()) as link:
        code = "import socket, sys; socket.create_connection((sys.argv[1], 9), timeout=2)"
        with pytest.raises(Lost, match="refused"):
            run(*link.inside(0), sys.executable, "-c", code, ENDS[1])
        with pytest.raises(Lost, match="unreachable"):
            run(*link.inside(0), sys.executable, "-c", code, "192.0.2.1")


def test_a_failure_inside_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), Link(Wire()) as link:
        raise ZeroDivisionError
    assert spaces(link.prefix) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_harness_that_is_killed_leaves_nothing(number: signal.Signals) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HELD], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    ) as harness:
        assert harness.stdout is not None
        prefix, inside = harness.stdout.readline().split()
        assert len(spaces(prefix)) == 2
        os.kill(int(inside), signal.SIGSTOP)  # as a system between two turns
        os.kill(harness.pid, number)
        harness.wait(10)
    end = time.monotonic() + 20
    while (left := spaces(prefix) or alive(inside)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


def test_what_a_dead_harness_left_is_removed_by_the_next() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    name = f"{PREFIX}-{gone.pid}-1a"
    run("ip", "netns", "add", name)
    remove_stale()
    assert spaces(name) == []
