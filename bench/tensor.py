"""Layers split over two ranks of one host: seconds a step against torch's DTensor over gloo, and one process."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.case import Case
from bench.data_parallel import START_S, STEP_S, Player, agreement
from bench.launched import ROOT
from bench.options import Options, say
from bench.peers import PYTHON, SHARDWISE, Peer, subject, torchrun
from bench.rounds import Outcome, play
from bench.rows import Row, missing, ratio, row
from bench.subject import close_all

OURS, DTENSOR, BY_VOCABULARY, ALONE = "shardwise", "dtensor", "dtensor:loss_parallel", "one process"
QUICK = (OURS, DTENSOR)
ROUNDS, QUICK_ROUNDS = 10, 3
WARM_UP = 4
# What our step may take, as a share of that of another: 1.5 times its rate is 0.667.
TARGETS = {64: "<= 0.667 x dtensor", 2048: "<= 0.909 x dtensor"}


def _ours(case: Case) -> list[str]:
    return [*SHARDWISE, "train", str(ROOT / "bench" / "jobs" / "tensor.py"), "--plan", f"tensor={case.ranks}"]


def _dtensor(*words: str) -> Callable[[Case], list[str]]:
    return lambda case: [*torchrun(case.ranks, "bench.subjects.tensor_torch"), *words]


def _alone(case: Case) -> list[str]:
    return [PYTHON, "-m", "bench.subjects.tensor_alone"]


PEERS = {
    OURS: Peer("shardwise", "pip install -e .", _ours),
    DTENSOR: Peer("torch", "pip install torch", _dtensor()),
    BY_VOCABULARY: Peer("torch", "pip install torch", _dtensor("loss_parallel")),
    ALONE: Peer("torch", "pip install torch", _alone, alone=True),
}


def run(options: Options) -> list[Row]:
    """64 and 2,048 tokens a step, width 512."""
    rows: list[Row] = []
    names = options.chosen(list(PEERS), QUICK)
    for case in cases(options):
        if options.wants(title(case)):
            rows += run_case(case, names, options)
            options.keep(rows)
    return rows


def cases(options: Options) -> list[Case]:
    """Two of them; `batch` is a rank's share of the samples, of which every rank has all."""
    small = Case(precision="float32", batch=1, layers=4, width=512, context=32)
    return [small] if options.quick else [small, replace(small, batch=4, context=256)]


def tokens(case: Case) -> int:
    """Of a step."""
    return case.global_batch * case.context


def title(case: Case) -> str:
    return f"{tokens(case)} tokens a step, width {case.width}, {case.ranks} ranks"


def run_case(case: Case, names: Sequence[str], options: Options) -> list[Row]:
    """The rows of one case."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    steps = 20 if tokens(case) < 1000 else 2
    say(f"{title(case)}: {rounds} rounds of {steps} steps")
    players: dict[str, Player] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        case = replace(case, folder=folder)
        case.write_tokens(WARM_UP + rounds * (1 + steps))
        try:
            for name in names:
                say(f"  starting {name}")
                whole = replace(case, ranks=1, batch=case.global_batch) if PEERS[name].alone else case
                players[name] = Player(subject(name, PEERS[name], whole))
                players[name].start()
            ready = [name for name in players if players[name].note is None]
            outcomes = play(ready, rounds, lambda name: players[name].turn(steps, START_S + STEP_S * steps))
        finally:
            close_all(player.subject for player in players.values())
    for name, player in players.items():
        outcomes.setdefault(name, Outcome([math.inf] * rounds, player.note))
    return _rows(case, names, players, outcomes)


def _rows(case: Case, names: Sequence[str], players: dict[str, Player], outcomes: dict[str, Outcome]) -> list[Row]:
    rows: list[Row] = []
    base = players[DTENSOR].losses if DTENSOR in players else []
    for name in names:
        if name not in players:
            rows.append(missing(title(case), name, "step_time", "s", "lower", PEERS[name].install))
            continue
        more = agreement(players[name].losses, base, case.precision) if base and players[name].losses else {}
        note = outcomes[name].note or players[name].note
        rows.append(row(title(case), name, "step_time", "s", "lower", outcomes[name].values, note=note, **more))
    for base_name in (DTENSOR, BY_VOCABULARY, ALONE):
        if base_name in outcomes and OURS in outcomes:
            target = TARGETS.get(tokens(case)) if base_name == DTENSOR else None
            ours, theirs = outcomes[OURS].values, outcomes[base_name].values
            rows.append(ratio(title(case), OURS, base_name, ours, theirs, target=target))
    return rows
