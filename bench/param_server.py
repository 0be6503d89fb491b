"""Parameter servers: what going through them costs, and what a slow worker costs the others."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.case import Case
from bench.data_parallel import Player, agreement, contest
from bench.launched import ROOT
from bench.options import Options, say
from bench.paced import Kept, Pace, kept, write_held_out
from bench.peers import PEERS, SHARDWISE, Peer, torchrun
from bench.rounds import Lost, Outcome, play
from bench.rows import Row, missing, ratio, row
from bench.subject import Subject

BASE, ALONE, DDP = "all_reduce", "alone", "ddp"
SYNC, STALE, ASYNC = "param_server:sync", "param_server:stale", "param_server:async"
PLANS = {
    BASE: "sync=all_reduce",
    SYNC: "sync=param_server,sync.method=sync",
    STALE: "sync=param_server,sync.bound=4",
    ASYNC: "sync=param_server,sync.method=async",
}
OLDER = (STALE, ASYNC)  # gradients of older parameters: other losses

# Equal workers: a step of `data_parallel`.
ROUNDS = {2: 5, 8: 3}  # by samples a rank
QUICK_ROUNDS = 3
RATIO = "<= 1.111"  # of the seconds a step: 0.9 of the rate
LAST = 5  # steps whose mean loss is shown

# A slow worker: all of them sleep for most of a step, so that two cores carry three of them.
WORKERS, TIMES = 3, 4
SLOW = f"1 of {WORKERS} workers slowed {TIMES} x"
PACE = Pace(sample_s=3e-3, times=TIMES, steps=100, settled=40)  # samples are dealt anew after some 20 steps
SMALL = Case(precision="float32", batch=8, ranks=WORKERS, layers=1, width=64, heads=2, vocab=64, context=32, lr=3e-3)
SEEDS, QUICK_SEEDS = 2, 1
MADE_AHEAD = 8  # steps whose samples the loader asks for before anybody computes them, and some
KEPT = ">= 0.8"
NOTE = (
    "all_reduce with nobody slow. A step has the same samples for every system; a fast worker that is dealt more of "
    "them takes longer for it, so its rate is counted in samples"
)
START_S, STEP_S = 120.0, 2.0  # deadlines: to start all ranks, and for one step
Train = Callable[..., Kept]
QUICK_EQUAL, QUICK_SLOW = (BASE, SYNC), (ALONE, STALE)


def run(options: Options) -> list[Row]:
    """Two equal workers with 2 and 8 samples each, then three of which one is slow."""
    known = [*PLANS, DDP, ALONE]
    level = [name for name in options.chosen(known, QUICK_EQUAL) if name != ALONE]
    uneven = [name for name in options.chosen(known, QUICK_SLOW) if name != DDP]
    rows: list[Row] = []
    for case in cases(options):
        if options.wants(str(case)):
            rows += equal(case, level, options)
    if options.wants(SLOW):
        rows += slowed(uneven, options, trained)
    return rows


def cases(options: Options) -> list[Case]:
    """The float32 cases of `data_parallel`; a shorter one under `--quick`."""
    found = [Case(precision="float32", batch=batch) for batch in ROUNDS]
    return [replace(found[0], layers=4)] if options.quick else found


# Equal workers.


def _command(plan: str) -> Callable[[Case], list[str]]:
    job = ROOT / "bench" / "jobs" / "data_parallel.py"
    return lambda case: [*SHARDWISE, "train", str(job), "--plan", f"data={case.ranks},{plan}"]


OURS = {name: Peer("shardwise", "pip install -e .", _command(plan)) for name, plan in PLANS.items()}
SYSTEMS = {**OURS, DDP: PEERS[DDP]}


def equal(case: Case, names: Sequence[str], options: Options, peers: Mapping[str, Peer] = SYSTEMS) -> list[Row]:
    """Seconds a step of each system, its ratio to an all-reduce, and the training loss that it came to."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS[case.batch])
    players, outcomes = contest(case, names, rounds, peers)
    title = str(case)
    rows = [_step_time(title, name, peers, players, outcomes) for name in names]
    for name in names:
        if name != BASE and name in outcomes and BASE in outcomes:
            values = outcomes[name].values, outcomes[BASE].values
            rows.append(ratio(title, name, BASE, *values, target=RATIO if name == SYNC else None))
    for name, player in players.items():
        if player.losses:
            rows.append(row(title, name, "loss", "", "lower", [statistics.fmean(player.losses[-LAST:])]))
    return rows


def _step_time(
    title: str,
    name: str,
    peers: Mapping[str, Peer],
    players: Mapping[str, Player],
    outcomes: Mapping[str, Outcome],
) -> Row:
    if name not in players:
        return missing(title, name, "step_time", "s", "lower", peers[name].install)
    more: dict[str, Any] = {}
    if name not in OLDER and BASE in players and players[name].losses:  # what computes the same numbers
        more = {"compared_with": BASE, **agreement(players[name].losses, players[BASE].losses, "float32")}
    notes = [outcomes[name].note or players[name].note, None if more.get("agrees", True) else "losses differ"]
    note = "; ".join(filter(None, notes)) or None
    checksum = players[name].checksum
    return row(title, name, "step_time", "s", "lower", outcomes[name].values, note=note, checksum=checksum, **more)


# One slow worker.


def slowed(names: Sequence[str], options: Options, train: Train) -> list[Row]:
    """Every system trains from its first step in every round, each round from other weights on other samples."""
    rounds = options.rounds or (QUICK_SEEDS if options.quick else SEEDS)
    say(f"{SLOW}: {rounds} x {PACE.steps} steps")
    found: dict[str, list[Kept]] = {name: [] for name in names}

    def turn(name: str) -> float:
        try:
            found[name].append(train(name, seed=1 + len(found[name])))
        except Lost as lost:
            say(f"  {name}: {lost}")
            raise
        return found[name][-1].fast

    outcomes = play(names, rounds, turn, worst=0.0)
    return slowed_rows(outcomes, found)


def slowed_rows(outcomes: Mapping[str, Outcome], found: Mapping[str, Sequence[Kept]]) -> list[Row]:
    """Samples a second of a fast worker and what is left of them, steps a second, and the loss after equal samples."""
    rows = []
    for name, outcome in outcomes.items():
        note = outcome.note or (NOTE if name == ALONE else None)
        rows.append(row(SLOW, name, "fast_worker", "samples/s", "higher", outcome.values, note=note))
    for name, outcome in outcomes.items():
        if name != ALONE and ALONE in outcomes:
            values = outcome.values, outcomes[ALONE].values
            target = KEPT if name == STALE else None
            rows.append(ratio(SLOW, name, ALONE, *values, better="higher", target=target))
    for name, runs in found.items():
        if runs:
            rows.append(row(SLOW, name, "steps", "1/s", "higher", [run.steps_per_s for run in runs]))
            rows.append(row(SLOW, name, "held_out_loss", "", "lower", [run.loss for run in runs]))
    return rows


def trained(name: str, *, seed: int) -> Kept:
    """One run of a system from its first step to the evaluation. Raises Lost."""
    plan = PLANS[BASE if name == ALONE else name]
    pace = replace(PACE, times=1.0) if name == ALONE else PACE
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        case = replace(SMALL, folder=folder, seed=seed)
        case.write_tokens(pace.steps + MADE_AHEAD)
        write_held_out(case)
        job = str(ROOT / "bench" / "jobs" / "paced.py")
        told = ["train", job, "--on", "env", "--plan", f"data={case.ranks},{plan}"]
        command = [*torchrun(case.ranks, "shardwise"), *told]  # which starts more ranks than there are cores
        env = {"CUDA_VISIBLE_DEVICES": ""} | case.environment() | pace.environment()
        subject = Subject(name, command, ranks=case.ranks, env=env, folder=folder)
        try:
            subject.start(START_S)
            answers = subject.run(pace.steps + 1, START_S + STEP_S * pace.steps)  # the evaluation follows the last
            return kept(pace, answers, subject.ask({"do": "tell"}, START_S))
        finally:
            subject.close()
