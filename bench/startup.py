"""Seconds from the shell to the end of the first training step with two ranks, and of `shardwise --help`."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench import stamp
from bench.case import Case
from bench.launched import ROOT, Launched
from bench.options import Options, say
from bench.peers import PYTHON, SHARDWISE, accelerate_launch, torchrun
from bench.rounds import Lost, Outcome, play
from bench.rows import Row, missing, ratio, row

CASE = Case(precision="float32", batch=4, layers=2, width=64, heads=4, vocab=512, context=64)
TITLE = f"train to step 1, {CASE.ranks} ranks"
HELP = "--help"
BASE = "bare"
ROUNDS, QUICK_ROUNDS = 30, 3
DEADLINE_S = 90.0
STEPS = 4  # for how many steps there is data


@dataclass(frozen=True)
class Launch:
    """One way to start the step: the command, what must be installed, and what installs it."""

    command: Callable[[], list[str]]
    package: str
    install: str
    target: str | None = None


LAUNCHES = {
    "shardwise": Launch(
        lambda: [*SHARDWISE, "train", str(ROOT / "bench" / "jobs" / "startup.py"), "--plan", f"data={CASE.ranks}"],
        "shardwise",
        "pip install -e .",
        "<= 1.5 x bare; < torchrun and accelerate",
    ),
    "bare": Launch(lambda: [PYTHON, "-m", "bench.subjects.bare_step"], "torch", "pip install torch"),
    "bare:preloaded": Launch(
        lambda: [PYTHON, "-m", "bench.subjects.bare_step", "--preloaded"], "torch", "pip install torch"
    ),
    "torchrun": Launch(lambda: torchrun(CASE.ranks, "bench.subjects.ddp_step"), "torch", "pip install torch"),
    "accelerate": Launch(
        lambda: accelerate_launch(CASE.ranks, "bench.subjects.accelerate_step"), "accelerate", "pip install accelerate"
    ),
}
QUICK = ("shardwise", "bare")


def run(options: Options) -> list[Row]:
    """Both cases. One unmeasured launch of each system comes first: it fills the page cache and our own."""
    names = options.chosen(list(LAUNCHES), QUICK)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if options.wants(TITLE):
            rows += _first_step(names, rounds, Path(folder))
        if options.wants(HELP) and "shardwise" in names:
            rows.append(_help(rounds, Path(folder)))
    return rows


def to_stamp(launched: Launched, prefix: Path, ranks: int, deadline_s: float) -> float:
    """Seconds from the start of a command to its ranks' last stamp. The command is ended. Raises Lost."""
    for old in prefix.parent.glob(f"{prefix.name}-*"):
        old.unlink()
    began = time.clock_gettime(time.CLOCK_MONOTONIC)
    try:
        launched.start()
        ended = launched.wait(deadline_s)
        moment = stamp.read(prefix, ranks)
        if moment is None:
            how = f"ended with status {launched.status}" if ended else f"hung: no step within {deadline_s:.0f} s"
            raise Lost(f"{how}; {launched.tail()}")
        return moment - began
    finally:
        launched.close(grace_s=0.0)


def to_exit(launched: Launched, deadline_s: float) -> float:
    """Seconds from the start of a command to its end with status 0. Raises Lost."""
    began = time.perf_counter()
    try:
        launched.start()
        if not launched.wait(deadline_s):
            raise Lost(f"hung: no end within {deadline_s:.0f} s; {launched.tail()}")
        seconds = time.perf_counter() - began
        if launched.status:
            raise Lost(f"ended with status {launched.status}; {launched.tail()}")
        return seconds
    finally:
        launched.close(grace_s=0.0)


def _first_step(names: list[str], rounds: int, folder: Path) -> list[Row]:
    say(f"{TITLE}: {rounds} rounds")
    case = replace(CASE, folder=str(folder))
    case.write_tokens(STEPS)
    # What a user's second command finds: the data cache and the probe of the machine are there already.
    env = case.environment() | {stamp.STAMP: str(folder / "stamp"), "XDG_CACHE_HOME": str(folder / "cache")}
    here = [name for name in names if importlib.util.find_spec(LAUNCHES[name].package)]

    def turn(name: str) -> float:
        launched = Launched(LAUNCHES[name].command(), env=env, folder=folder)
        return to_stamp(launched, folder / "stamp", case.ranks, DEADLINE_S)

    failed: dict[str, Outcome] = {}
    for name in here:
        try:
            say(f"  {name}: {turn(name):.2f} s to warm up")
        except Lost as lost:
            say(f"  {name}: {lost}")
            failed[name] = Outcome([math.inf] * rounds, f"before the first round: {lost}")
    outcomes = play([name for name in here if name not in failed], rounds, turn) | failed
    rows: list[Row] = []
    for name in names:
        launch = LAUNCHES[name]
        if name in outcomes:
            more = {"target": launch.target, "note": outcomes[name].note}
            rows.append(row(TITLE, name, "seconds", "s", "lower", outcomes[name].values, **more))
        else:
            rows.append(missing(TITLE, name, "seconds", "s", "lower", launch.install))
    return rows + _ratios(outcomes)


def _ratios(outcomes: dict[str, Outcome]) -> list[Row]:
    """Every system against the bare script, and shardwise against the best of scripts and the other launchers."""
    pairs = [(name, BASE, "<= 1.5" if name == "shardwise" else None) for name in outcomes if name != BASE]
    pairs += [("shardwise", "bare:preloaded", None)]
    pairs += [("shardwise", name, "< 1") for name in ("torchrun", "accelerate")]
    return [
        ratio(TITLE, name, base, outcomes[name].values, outcomes[base].values, target=target)
        for name, base, target in pairs
        if name in outcomes and base in outcomes
    ]


def _help(rounds: int, folder: Path) -> Row:
    say(f"shardwise --help: {rounds} rounds")

    def turn(name: str) -> float:
        return to_exit(Launched([*SHARDWISE, "--help"], env={}, folder=folder), DEADLINE_S)

    try:
        turn("shardwise")
    except Lost as lost:
        note = f"before the first round: {lost}"
        return row(HELP, "shardwise", "seconds", "s", "lower", [math.inf], target="< 0.3 s", note=note)
    found = play(["shardwise"], rounds, turn)["shardwise"]
    return row(HELP, "shardwise", "seconds", "s", "lower", found.values, target="< 0.3 s", note=found.note)
