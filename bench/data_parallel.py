"""Seconds a step of data-parallel training, two ranks, against the frameworks that people use for it."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench import machine
from bench.case import Case
from bench.options import Options, say
from bench.peers import PEERS, Peer, subject
from bench.rounds import Lost, Outcome, play
from bench.rows import Row, missing, ratio, row
from bench.subject import Subject, close_all

BASE = "ddp"
QUICK = ("shardwise", "ddp", "barrier")
ROUNDS, QUICK_ROUNDS = 14, 3  # 14: all systems in all four cases take less than half an hour on two cores
WARM_UP = 4  # steps before the first round
START_S, STEP_S = 120.0, 20.0  # deadlines: to start all ranks, and for one step
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# What a system's step may take, as a share of that of another; 1.02: at least 0.98 of its rate.
TARGETS = {
    ("shardwise", BASE): "<= 1.0 x ddp",
    ("shardwise:exact", "shardwise"): "<= 1.1 x shardwise",
    ("shardwise", "barrier"): "<= 1.02 x barrier",
}


@dataclass
class Player:
    """A system in a case: its processes and what its steps returned, mean over the ranks."""

    subject: Subject
    losses: list[float] = field(default_factory=list)
    checksum: float | None = None
    note: str | None = None

    def start(self) -> None:
        """Start it and do the steps before the first round; a failure is noted."""
        try:
            self.subject.start(START_S)
            self.turn(WARM_UP - 1, START_S)
        except Lost as lost:
            say(f"  {self.subject.name}: {lost}")
            self.note = f"before the first round: {lost}"
            self.subject.close(grace_s=0)

    def turn(self, steps: int, deadline_s: float) -> float:
        """Run one step to warm up and then `steps` timed ones; seconds a step of the slowest rank. Raises Lost.

        Between its turns a system is stopped, daemons and all: nobody pays for another's heartbeats.
        """
        try:
            self.subject.launched.thaw()
            answers = self.subject.run(1 + steps, deadline_s)
            self.subject.launched.freeze()
        except Lost as lost:
            self.note = str(lost)
            self.subject.close(grace_s=0)
            raise
        self.losses += [statistics.fmean(each) for each in zip(*(a["losses"] for a in answers), strict=True)]
        return max(statistics.fmean(answer["seconds"][1:]) for answer in answers)

    def add_up(self) -> None:
        """Ask for the checksum of the parameters, unless it was lost."""
        if self.note is None:
            try:
                self.subject.launched.thaw()
                self.checksum = self.subject.checksums(STEP_S)[0]
            except Lost as lost:
                self.note = f"after the last round: {lost}"


def run(options: Options) -> list[Row]:
    """All cases, or one short one under `--quick`."""
    names = options.chosen(list(PEERS), QUICK)
    rows: list[Row] = []
    for case in cases(options):
        if options.wants(str(case)):
            rows += run_case(case, names, options)
            options.keep(rows)
    return rows


def cases(options: Options) -> list[Case]:
    """float32 and bfloat16, 2 and 8 samples a rank; on a machine with one GPU a single rank."""
    ranks = 2
    if options.device == "cuda":
        devices = machine.device_count()
        if not devices:
            raise SystemExit("--device cuda: this machine has no CUDA device that torch can use. Leave --device out.")
        ranks = min(2, devices)
    found = [
        Case(precision=precision, batch=batch, ranks=ranks, device=options.device)
        for precision in ("float32", "bfloat16")
        for batch in (2, 8)
    ]
    return [replace(found[2], layers=4)] if options.quick else found


def steps_a_turn(case: Case) -> int:
    """Timed steps in one turn: enough that a turn takes over a second, so that waking up weighs little."""
    return 8 if case.device == "cuda" else 1 if case.batch > 2 else 4


def run_case(case: Case, names: Sequence[str], options: Options, peers: Mapping[str, Peer] = PEERS) -> list[Row]:
    """One case: the rows of every system, and what they computed compared."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return _rows(case, names, peers, *contest(case, names, rounds, peers))


def contest(
    case: Case, names: Sequence[str], rounds: int, peers: Mapping[str, Peer]
) -> tuple[dict[str, Player], dict[str, Outcome]]:
    """Start every system that is installed, play the rounds (seconds a step), end them all."""
    steps = steps_a_turn(case)
    say(f"{case}: {rounds} rounds of {steps} steps")
    players: dict[str, Player] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        case = replace(case, folder=folder)
        case.write_tokens(WARM_UP + rounds * (1 + steps))
        try:
            for name in names:
                if peers[name].installed():
                    say(f"  starting {name}")
                    players[name] = Player(subject(name, peers[name], replace(case, exact=peers[name].exact)))
                    players[name].start()
            ready = [name for name in players if players[name].note is None]
            outcomes = play(ready, rounds, lambda name: players[name].turn(steps, STEP_S * (1 + steps)))
            for player in players.values():
                player.add_up()
        finally:
            close_all(player.subject for player in players.values())
    for name, player in players.items():
        outcomes.setdefault(name, Outcome([math.inf] * rounds, player.note))
    return players, outcomes


def _rows(
    case: Case,
    names: Sequence[str],
    peers: Mapping[str, Peer],
    players: Mapping[str, Player],
    outcomes: Mapping[str, Outcome],
) -> list[Row]:
    title = str(case)
    rows: list[Row] = []
    together = [name for name in players if not peers[name].alone]
    compared = BASE if BASE in together else next(iter(together), None)
    for name in names:
        if name not in players:
            rows.append(missing(title, name, "step_time", "s", "lower", peers[name].install))
            continue
        more: dict[str, Any] = {}
        if compared and players[name].losses and not peers[name].alone:
            more = agreement(players[name].losses, players[compared].losses, case.precision)
            more["compared_with"] = compared
        notes = [outcomes[name].note or players[name].note, None if more.get("agrees", True) else "losses differ"]
        rows.append(
            row(
                title,
                name,
                "step_time",
                "s",
                "lower",
                outcomes[name].values,
                target=targets_of(name),
                note="; ".join(filter(None, notes)) or None,
                checksum=players[name].checksum,
                **more,
            )
        )
    return rows + _ratios(title, names, outcomes)


def _ratios(title: str, names: Sequence[str], outcomes: Mapping[str, Outcome]) -> list[Row]:
    """Everybody's step to that of DDP, and what else has a target."""
    pairs = dict.fromkeys([*((name, BASE) for name in names if name != BASE), *TARGETS])
    return [
        ratio(title, name, base, outcomes[name].values, outcomes[base].values, target=TARGETS.get((name, base)))
        for name, base in pairs
        if name in outcomes and base in outcomes
    ]


def targets_of(name: str) -> str | None:
    """All targets of a system, for its row of seconds."""
    return ", ".join(target for (system, _), target in TARGETS.items() if system == name) or None


def agreement(losses: Sequence[float], others: Sequence[float], precision: str) -> dict[str, Any]:
    """The largest difference between two loss curves, step by step, and whether it is within the tolerance."""
    both = min(len(losses), len(others))
    if not both:
        return {"agrees": False, "max_loss_difference": math.inf, "compared_steps": 0}
    gaps = [abs(one - other) for one, other in zip(losses[:both], others[:both], strict=True)]
    largest = max(gap if math.isfinite(gap) else math.inf for gap in gaps)
    return {
        "agrees": largest <= TOLERANCE[precision],
        "max_loss_difference": largest,
        "compared_steps": both,
        "first_loss": losses[0],
        "last_loss": losses[both - 1],
    }
