"""The callback that lets the harness ask a training loop for its steps."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from bench.line import Line, serve

LOOP = """
import sys
from types import SimpleNamespace
from bench.served import Served
served = Served(lambda: 42.0, tell=lambda state: {"at": state})
for step in range(100):
    served(step, SimpleNamespace(loss=float(step)))
"""


def test_the_first_step_counts_as_part_of_the_first_turn(tmp_path: Path) -> None:
    address = str(tmp_path / "line")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(address)
        door.listen(1)
        door.settimeout(20.0)
        env = {"SHARDWISE_BENCH_SOCKET": address, "RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": "."}
        with subprocess.Popen([sys.executable, "-c", LOOP], env=env) as loop:
            line = Line(door.accept()[0])
            assert {**(line.receive(10.0) or {}), "pid": 0} == {"rank": 1, "world": 2, "pid": 0}
            line.send({"do": "run", "steps": 3})
            assert (line.receive(10.0) or {})["losses"] == [0.0, 1.0, 2.0]
            line.send({"do": "run", "steps": 1})
            answer = line.receive(10.0) or {}
            assert answer["losses"] == [3.0]
            assert len(answer["seconds"]) == 1
            assert answer["seconds"][0] > 0
            line.send({"do": "checksum"})
            assert line.receive(10.0) == {"checksum": 42.0}
            line.send({"do": "tell"})
            assert line.receive(10.0) == {"at": 3}
            line.send({"do": "stop"})
            assert loop.wait(10.0) == 0
            line.close()


def test_a_rank_goes_on_until_all_have_done_their_steps_and_needs_fewer_then() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line, done = Line(ours), 0

        def step() -> float:
            nonlocal done
            done += 1
            return float(done)

        def together(steps: int) -> bool:
            """The other rank is two steps slower in the first turn."""
            return steps > 3 or done >= steps + 2

        for command in ({"do": "run", "steps": 3}, {"do": "run", "steps": 4}, {"do": "stop"}):
            line.send(command)
        serve(step, rank=0, world=2, line=Line(theirs), together=together)
        answers = [line.receive(5.0) or {} for _ in range(3)]
        assert [answer.get("losses") for answer in answers] == [None, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
        assert [len(answer["seconds"]) for answer in answers[1:]] == [3, 4]
        assert done == 7


def test_a_message_may_arrive_in_pieces() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = Line(ours)
        whole = json.dumps({"a": 1}).encode() + b"\n" + json.dumps({"b": 2}).encode() + b"\n"
        theirs.sendall(whole[:5])
        theirs.sendall(whole[5:])
        assert line.receive(5.0) == {"a": 1}
        assert line.receive(5.0) == {"b": 2}
        theirs.close()
        assert line.receive(5.0) is None
