from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# The real command line with systems that need no torch, one of which is still starting.
CODE = """
import sys
import bench.data_parallel as data_parallel
from bench.__main__ import main
from bench.peers import Peer

def fake(behaviour):
    command = lambda case: [sys.executable, sys.argv[1], "2", behaviour]
    return Peer("sys", "", command)

data_parallel.PEERS.clear()
data_parallel.PEERS.update({"ddp": fake("even"), "lightning": fake(sys.argv[2])})
sys.exit(main(["data_parallel", "--cases", "float32 batch=2", "--rounds", "500"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
@pytest.mark.parametrize(
    ("number", "behaviour"),
    [(signal.SIGTERM, "even"), (signal.SIGINT, "mute")],
    ids=["ended in a round", "Ctrl-C while one starts"],
)
def test_an_interrupted_benchmark_leaves_nothing_behind(number: signal.Signals, behaviour: str) -> None:
    mark = uuid.uuid4().hex
    fake = Path(__file__).with_name("fake_subject.py")
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(fake), behaviour],
        cwd=ROOT,
        env=os.environ | {"SHARDWISE_TEST_MARK": mark},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as bench:
        try:
            end = time.monotonic() + 20
            while len(marked(mark)) < 7:  # itself, and two systems of a launcher and two ranks
                assert time.monotonic() < end, marked(mark)
                time.sleep(0.02)
            bench.send_signal(number)
            _, said = bench.communicate(timeout=20)
        finally:
            bench.kill()
    assert bench.returncode == 130
    assert "was interrupted; its systems are ended." in said
    assert "Traceback" not in said
    assert marked(mark) == []


def marked(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
