"""Pipelines: the bubble of each schedule against what its order allows; the rate against torch's and DeepSpeed's."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bench.case import Case
from bench.data_parallel import Player, contest
from bench.launched import ROOT
from bench.options import Options, say
from bench.peers import PYTHON, SHARDWISE, Peer, free_port, torchrun
from bench.rounds import Outcome, play
from bench.rows import Row, missing, ratio, row
from bench.subject import Subject, close_all

SCHEDULES = {"naive": 1, "gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2, "zbv": 2}  # and stages a rank
RANKS = (2, 4)
ROUNDS, QUICK_ROUNDS = 5, 2
BLOCK_S, QUICK_BLOCK_S = 0.048, 0.012  # that a block sleeps for; the shortest stages here have one block
START_S, TURN_S = 90.0, 60.0
WITHIN = "<= 1.03"  # of the seconds that the schedule's order allows
MICROBATCHES = 8

OURS = ("shardwise:gpipe", "shardwise:1f1b", "shardwise:interleaved", "shardwise:zero_bubble", "shardwise:zbv")
TORCH, TORCH_GPIPE, DEEPSPEED, BARE = "torch:1f1b", "torch:gpipe", "deepspeed", "one rank"
QUICK = ("shardwise:1f1b", TORCH)
TARGETS = {TORCH: "<= 1.0 x torch", DEEPSPEED: "< 1.0 x deepspeed"}


def run(options: Options) -> list[Row]:
    """The bubbles on 2 and 4 ranks, then the rate of a GPT in two stages."""
    rows: list[Row] = []
    for ranks in RANKS[:1] if options.quick else RANKS:
        if options.wants(title := f"bubble on {ranks} ranks"):
            rows += bubbles(title, ranks, options)
            options.keep(rows)
    case = Case(precision="float32", batch=8)
    case = replace(case, layers=4, context=64) if options.quick else case
    if options.wants(f"GPT in 2 stages {case}"):
        rows += rates(case, options)
    return rows


# The bubble.


def bubbles(title: str, ranks: int, options: Options) -> list[Row]:
    """Seconds of a step of sleeping blocks under each schedule, and of the same order with nothing to pay for.

    A block is asked to sleep as long as all others; how long it takes is calibrated by one rank that has all of them.
    """
    from bench.jobs.sleeping import BLOCKS, MICROBATCHES
    from bench.orders import Costs, makespan, orders

    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    block_s = QUICK_BLOCK_S if options.quick else BLOCK_S
    names = options.chosen(list(SCHEDULES), ("1f1b",))
    say(f"{title}: {rounds} rounds of one step")
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    players = {name: _sleeping(name, ranks, block_s, folder.name) for name in (*names, BARE)}
    try:
        for name, player in players.items():
            say(f"  starting {name}")
            player.subject.start(START_S)
            player.turn(1, START_S)
        outcomes = play([*names, BARE], rounds, lambda name: players[name].turn(1, TURN_S))
    finally:
        close_all(player.subject for player in players.values())
        folder.cleanup()
    alone = outcomes.pop(BARE)
    asked = 3 * BLOCKS * block_s * MICROBATCHES
    took = statistics.median(alone.values or [asked]) / asked
    rows = [row(title, BARE, "step_time", "s", "lower", alone.values, note=alone.note)]
    for name, outcome in outcomes.items():
        each = BLOCKS // (ranks * SCHEDULES[name]) * block_s
        costs = {stage: Costs(each, each, each) for stage in range(ranks * SCHEDULES[name])}
        least = makespan(orders(name, ranks, MICROBATCHES), costs)
        rows.append(row(title, name, "step_time", "s", "lower", outcome.values, note=outcome.note))
        busy = took * asked / ranks
        rows.append(row(title, name, "bubble", "", "lower", [1 - busy / value for value in outcome.values]))
        rows.append(row(title, name, "bubble_of_the_order", "", "lower", [1 - asked / ranks / least]))
        for order, seconds, target in (("order_as_asked", least, None), ("order", took * least, WITHIN)):
            within = [value / seconds for value in outcome.values]
            rows.append(row(title, name, f"ratio_to_the_{order}", "x", "lower", within, target=target))
    return rows


def _sleeping(name: str, ranks: int, block_s: float, folder: str) -> Player:
    """Under torchrun, which starts more ranks than there are cores: these do not compute."""
    ranks = 1 if name == BARE else ranks
    job = str(ROOT / "bench" / "jobs" / "sleeping.py")
    told = ["--on", "env", "--plan", _plan(name, ranks), "--set", f"block_s={block_s}"]
    launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python"]
    command = [*launcher, *SHARDWISE, "train", job, *told]
    return Player(Subject(name, command, ranks=ranks, env={"CUDA_VISIBLE_DEVICES": ""}, folder=folder))


def _plan(schedule: str, ranks: int) -> str:
    if ranks == 1:
        return f"data=1,microbatches={MICROBATCHES}"
    virtual = f",virtual={SCHEDULES[schedule]}" if SCHEDULES[schedule] > 1 else ""
    return f"data=1,pipeline={ranks},microbatches={MICROBATCHES},schedule={schedule}{virtual}"


# The rate.


def _ours(schedule: str) -> Callable[[Case], list[str]]:
    job = str(ROOT / "bench" / "jobs" / "pipeline.py")
    return lambda case: [*SHARDWISE, "train", job, "--plan", _plan(schedule, case.ranks)]


def _torch(schedule: str) -> Callable[[Case], list[str]]:
    return lambda case: [*torchrun(case.ranks, "bench.subjects.pipeline_torch"), schedule]


def _deepspeed(case: Case) -> list[str]:
    count = ["--num_nodes", "1", "--num_accelerators", str(case.ranks), "--master_port", str(free_port())]
    runner = [PYTHON, "-m", "deepspeed.launcher.runner"]
    return [*runner, *count, "--no_local_rank", "--module", "bench.subjects.pipeline_deepspeed"]


PEERS = {
    **{name: Peer("shardwise", "pip install -e .", _ours(name.partition(":")[2])) for name in OURS},
    TORCH_GPIPE: Peer("torch", "pip install torch", _torch("gpipe")),
    TORCH: Peer("torch", "pip install torch", _torch("1f1b")),
    DEEPSPEED: Peer("deepspeed", "DS_BUILD_OPS=0 pip install deepspeed", _deepspeed),
}


def rates(case: Case, options: Options) -> list[Row]:
    """Seconds a step of each system, and the ratio of ours under 1F1B to the others."""
    title = f"GPT in 2 stages {case}"
    names = options.chosen(list(PEERS), QUICK)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else 2 * ROUNDS)
    players, outcomes = contest(case, names, rounds, PEERS)
    rows = [_step_time(title, name, players, outcomes) for name in names]
    for ours in [name for name in names if name in OURS]:
        for base in (TORCH, TORCH_GPIPE, DEEPSPEED):
            if base in outcomes and ours in outcomes:
                target = TARGETS.get(base) if ours == "shardwise:1f1b" else None
                rows.append(ratio(title, ours, base, outcomes[ours].values, outcomes[base].values, target=target))
    return rows


def _step_time(title: str, name: str, players: Mapping[str, Player], outcomes: Mapping[str, Outcome]) -> Row:
    if name not in players:
        return missing(title, name, "step_time", "s", "lower", PEERS[name].install)
    more: dict[str, Any] = {"first_losses": players[name].losses[:3]} if players[name].losses else {}
    note = outcomes[name].note or players[name].note
    return row(title, name, "step_time", "s", "lower", outcomes[name].values, note=note, **more)
