"""Tokens a second of packed text from disk, the memory that a large corpus takes, and how long the demo waited."""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import corpus
from bench.launched import ROOT, Launched
from bench.options import Options, say
from bench.peers import PYTHON
from bench.rounds import Lost, Outcome, play
from bench.rows import Row, missing, ratio, row
from bench.subject import Subject, close_all
from bench.texts import Texts
from shardwise import events

RATE = "packed text, shuffled"
MEMORY = "a corpus of 2 GB"
DEMO = "demo"
BASE = "torch"
ROUNDS, QUICK_ROUNDS = 30, 3
STEPS = 200  # batches in a turn
CORPUS_BYTES, QUICK_BYTES, LARGE_BYTES = 64 << 20, 8 << 20, 2 * 10**9
START_S, TURN_S, PREPARE_S, LARGE_S = 120.0, 120.0, 120.0, 3600.0
DEMO_COMMAND = "shardwise train recipes/python_stdlib.py"


@dataclass(frozen=True)
class Peer:
    """A loader: the module that serves its batches, its settings, and what must be installed."""

    module: str
    package: str
    install: str
    settings: Mapping[str, int | bool] = field(default_factory=dict)


PEERS = {
    "shardwise": Peer("loader_shardwise", "shardwise", "pip install -e ."),
    "torch": Peer("loader_torch", "torch", "pip install torch"),
    "torch:batched": Peer("loader_torch", "torch", "pip install torch", {"batched": True}),
    "torch:workers=2": Peer("loader_torch", "torch", "pip install torch", {"workers": 2}),
    "datasets": Peer("loader_datasets", "datasets", "pip install datasets"),
}
QUICK = ("shardwise", "torch")


def run(options: Options) -> list[Row]:
    """The rate of all loaders; without `--quick` the memory and the demo's waiting share too."""
    names = options.chosen(list(PEERS), QUICK)
    rows: list[Row] = []
    if options.wants(RATE):
        rows += rates(names, options)
    if not options.quick and "shardwise" in names:
        for tokenizer in ("bytes", "bpe"):
            case = f"{MEMORY}, {tokenizer}"
            if options.wants(case):
                rows.append(memory(case, tokenizer, LARGE_BYTES))
        if options.wants(DEMO):
            rows.append(waiting(Path(options.run or "runs/latest")))
    return rows


def rates(names: list[str], options: Options) -> list[Row]:
    """Every loader's rate over the same corpus, and whether an epoch of each has the same tokens in it."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    say(f"{RATE}: {rounds} rounds of {STEPS} batches")
    players: dict[str, Player] = {}
    sums: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        texts = Texts(folder=folder)
        corpus.write(texts.corpus, QUICK_BYTES if options.quick else CORPUS_BYTES)
        finish(_prepare(texts), PREPARE_S)
        try:
            for name in names:
                if importlib.util.find_spec(PEERS[name].package):
                    say(f"  starting {name}")
                    players[name] = Player(name, texts)
                    players[name].start()
            ready = [name for name in players if players[name].note is None]
            outcomes = play(ready, rounds, lambda name: players[name].turn(), worst=0.0)
            for name in ready:
                if outcomes[name].note is None:
                    sums[name] = players[name].subject.checksums(TURN_S)[0]
        finally:
            close_all(player.subject for player in players.values())
    for name, player in players.items():
        outcomes.setdefault(name, Outcome([0.0] * rounds, player.note))
    return _rate_rows(names, outcomes, sums)


class Player:
    """A loader in a process of its own; `note` says how it was lost."""

    def __init__(self, name: str, texts: Texts) -> None:
        peer = PEERS[name]
        self.tokens = texts.batch * texts.context * STEPS
        env = replace(texts, **peer.settings).environment()  # type: ignore[arg-type]
        command = [PYTHON, "-m", f"bench.subjects.{peer.module}"]
        self.subject = Subject(name, command, ranks=1, env=env, folder=texts.folder)
        self.note: str | None = None

    def start(self) -> None:
        """Start it and read a first lot of batches to warm up; a failure is noted."""
        try:
            self.subject.start(START_S)
            self.turn()
        except Lost as lost:
            self.note = f"before the first round: {lost}"
            self.subject.close(grace_s=0)

    def turn(self) -> float:
        """Read STEPS batches; tokens a second. Raises Lost."""
        try:
            answer = self.subject.run(STEPS, TURN_S)[0]
        except Lost:
            self.subject.close(grace_s=0)
            raise
        return self.tokens / math.fsum(answer["seconds"])


def _rate_rows(names: list[str], outcomes: Mapping[str, Outcome], sums: Mapping[str, float]) -> list[Row]:
    rows: list[Row] = []
    common = statistics.mode(sums.values()) if sums else None
    for name in names:
        if name not in outcomes:
            rows.append(missing(RATE, name, "tokens_per_s", "tokens/s", "higher", PEERS[name].install))
            continue
        agrees = sums.get(name) == common if name in sums else None
        note = outcomes[name].note or ("read other tokens than the rest" if agrees is False else None)
        target = ">= 20 M" if name == "shardwise" else None
        more: dict[str, Any] = {"note": note, "agrees": agrees, "checksum": sums.get(name), "target": target}
        rows.append(row(RATE, name, "tokens_per_s", "tokens/s", "higher", outcomes[name].values, **more))
    if BASE in outcomes:
        base = outcomes[BASE].values
        others = [name for name in outcomes if name != BASE]
        rows += [ratio(RATE, name, BASE, outcomes[name].values, base, better="higher") for name in others]
    return rows


def memory(case: str, tokenizer: str, size: int) -> Row:
    """The largest resident memory of a process that tokenises a corpus of `size` bytes and reads all of it."""
    say(case)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        texts = Texts(folder=folder, tokenizer=tokenizer)
        corpus.write(texts.corpus, size)
        launched = _prepare(texts, "--read")
        began = time.perf_counter()
        try:
            peak = float(finish(launched, LARGE_S))
            note = f"tokenised and read in {time.perf_counter() - began:.0f} s"
        except Lost as lost:
            peak, note = math.inf, str(lost)
    return row(case, "shardwise", "peak_bytes", "bytes", "lower", [peak], target="< 300 MB", note=note)


def finish(launched: Launched, limit_s: float) -> int:
    """Wait for a command and return the most resident memory that its processes had together, in bytes. Raises Lost."""
    peak = 0
    end = time.monotonic() + limit_s
    try:
        launched.start()
        while not launched.wait(0.05):
            peak = max(peak, sum(resident_bytes(pid) for pid in launched.pids()))
            if time.monotonic() > end:
                raise Lost(f"hung: no end within {limit_s:.0f} s; {launched.tail()}")
        if launched.status:
            raise Lost(f"ended with status {launched.status}; {launched.tail()}")
        return peak
    finally:
        launched.close(grace_s=0.0)


def resident_bytes(pid: int) -> int:
    """A process's resident memory in bytes; 0 when it has ended, and where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def waiting(run: Path) -> Row:
    """The share of all steps' time that a run stood waiting for data, from its events; its first step is left out."""
    steps = [event for event in events.read(run / "events.jsonl") if event["event"] == "step"][1:]
    if not steps:
        return missing(DEMO, "shardwise", "waiting_share", "", "lower", DEMO_COMMAND)
    share = math.fsum(step["wait_s"] for step in steps) / math.fsum(step["seconds"] for step in steps)
    note = f"{len(steps)} steps of {run.resolve().name}"
    return row(DEMO, "shardwise", "waiting_share", "", "lower", [share], target="< 0.01", note=note)


def _prepare(texts: Texts, *more: str) -> Launched:
    command = [PYTHON, "-m", "bench.subjects.loader_prepare", *more]
    return Launched(command, env=texts.environment(), folder=ROOT)
