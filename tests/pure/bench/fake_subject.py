"""A system under test without torch: `python fake_subject.py RANKS BEHAVIOUR`; every rank is a forked process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bench.line import serve


def main(ranks: int, behaviour: str) -> None:
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be(rank, ranks, behaviour)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def be(rank: int, world: int, behaviour: str) -> None:
    """`even`: losses 10, 9, 8 ...; `hang:N`, `die:N`: so many steps, then that; `mute`: never connects;
    `drift`: its losses are off by a half."""
    kind, _, number = behaviour.partition(":")
    if kind == "mute":
        time.sleep(600)
    if kind == "escape" and os.fork() == 0:  # a grandchild in a session of its own, as daemons are
        os.setsid()
        Path(number).write_text(str(os.getpid()))
        time.sleep(600)
    done = 0

    def step() -> float:
        nonlocal done
        done += 1
        if kind == "hang" and done > int(number):
            time.sleep(600)
        if kind == "die" and done > int(number):
            sys.stderr.write("out of luck\n")
            os._exit(7)
        time.sleep(0.001)
        return 11.0 - done + rank + (0.5 if kind == "drift" else 0.0)

    serve(step, rank=rank, world=world, checksum=lambda: float(done), facts={"kind": kind})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
