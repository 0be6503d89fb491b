"""Tokens a second and seconds to the same held-out loss over links that are too slow, against DDP and its hooks.

Losses do not depend on the link, so each system is trained once (DDP for each seed) over a wire that nothing limits;
its step is then timed over every other. Only a system that looks at the link before it chooses is trained over each,
with each seed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import multipath
from bench.curves import Curve
from bench.netns import Link, Wire, unavailable
from bench.options import Options, say
from bench.rounds import Lost, Outcome, play
from bench.rows import Row, missing
from bench.slow_case import SlowCase, write_text
from bench.slow_rows import Found, rows_of
from bench.slow_systems import BASE, LIMIT, QUICK, SYSTEMS
from bench.slow_train import Player, learn, subject
from bench.subject import close_all

WIRES = (Wire(10), Wire(100), Wire(1000), Wire(), Wire(100, 10), Wire(10, 10))
SEEDS = (1, 2)  # of the mode that is picked, and of DDP, whose loss it is compared with; others are trained once
ROUNDS, FEW_ROUNDS, QUICK_ROUNDS = 12, 5, 3
FEW_BELOW_MBIT = 1000  # slower than this no target is a matter of a few per cent, and a round takes long
QUICK_STEPS = 60
TURN_S, QUICK_TURN_S, QUICK_PROBE_S = 1.5, 0.8, 1.5
REAL_S = 300.0  # a system that adapts is trained over a link for real where that takes no longer
ENDLESS = 10**6  # steps, for the learning rate of what is only timed

Curves = dict[str, list[Curve]]


def run(options: Options) -> list[Row]:
    """The loss curves of all systems, then their speed over each wire."""
    names = options.chosen(list(SYSTEMS), QUICK)
    wires = [wire for wire in WIRES if options.wants(str(wire))]
    if options.quick:
        wires = [wire for wire in wires if wire == Wire(100)]
    absent = {name: why for name in names if (why := SYSTEMS[name].absent())}
    here = [name for name in names if name not in absent]
    rows: list[Row] = [] if options.only else multipath.rows(options)
    if why := unavailable():
        say(f"slow_link is skipped: {why}")
        return [_missing(wire, name, why) for wire in wires for name in names] + rows
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cases = _cases(Path(folder), options)
        alike = [name for name in here if not SYSTEMS[name].adapts and (name != LIMIT or not options.quick)]
        curves, lost = _all_curves(alike, cases)
        for wire in wires:
            try:
                rows += _on_wire(wire, here, cases, curves, dict(lost), options)
            except Lost as why_not:
                say(f"{wire} is skipped: {why_not}")
                rows += [_missing(wire, name, str(why_not)) for name in here]
            rows += [_missing(wire, name, why) for name, why in absent.items()]
            options.keep(rows)
    return rows


def _cases(folder: Path, options: Options) -> list[SlowCase]:
    """The case once for each seed, with its text."""
    say("preparing the text")
    short = {"steps": QUICK_STEPS, "warmup": QUICK_STEPS // 5} if options.quick else {}
    found = []
    for seed in SEEDS[:1] if options.quick else SEEDS:
        place = folder / f"seed-{seed}"
        place.mkdir()
        found.append(SlowCase(seed=seed, folder=str(place), **short))
        write_text(found[-1])
    return found


def _all_curves(names: Sequence[str], cases: Sequence[SlowCase]) -> tuple[Curves, dict[str, str]]:
    """One curve for each system and seed, over a wire that nothing limits; and why a system lacks one."""
    curves: Curves = {}
    lost: dict[str, str] = {}
    for name in names:
        try:
            curves[name] = []
            for case in cases if name == BASE else cases[:1]:
                curves[name].append(learn(name, case, Wire()))
                say(f"  {name}, seed {case.seed}: held-out loss {curves[name][-1].last:.4f} after {case.steps} steps")
        except Lost as why:
            say(f"  {name}: {why}")
            lost[name] = f"while it was trained: {why}"
    return curves, lost


def _on_wire(
    wire: Wire,
    names: Sequence[str],
    cases: Sequence[SlowCase],
    curves: Curves,
    lost: dict[str, str],
    options: Options,
) -> list[Row]:
    """Measure the wire, then play the rounds over it. Raises Lost where there cannot be one."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else _rounds(wire))
    case = replace(cases[0], steps=ENDLESS)
    players: dict[str, Player] = {}
    with Link(wire) as link:
        measured = link.measure(*([QUICK_PROBE_S] if options.quick else []))
        say(f"{wire}: {measured}; {rounds} rounds")
        outcomes: dict[str, Outcome] = {}
        try:
            for several in _turns(names):
                for name in several:
                    say(f"  starting {name}")
                    system = SYSTEMS[name].briefly()
                    turn_s = QUICK_TURN_S if options.quick else TURN_S
                    one = subject(name, system, link, case)
                    players[name] = Player(one, system.period, turn_s, whole=system.whole)
                    players[name].start(system.start)
                ready = [name for name in several if players[name].note is None]
                outcomes |= play(ready, rounds, lambda name: players[name].turn())
                for name in several:
                    players[name].listen()
                close_all(players[name].subject for name in several)
        finally:
            close_all(player.subject for player in players.values())
    for name, player in players.items():
        outcomes.setdefault(name, Outcome([math.inf] * rounds, player.note))
        if why := outcomes[name].note:
            lost[name] = why
    real = {name: found for name in names if (found := _real(name, cases, wire, outcomes[name]))}
    step_s = {name: outcomes[name].values for name in names}
    told = {name: player.told for name, player in players.items()}
    return rows_of(Found(wire, measured, cases[0], step_s, curves | real, frozenset(real), told, lost))


def _turns(names: Sequence[str]) -> list[list[str]]:
    """Those that take turns, and each of those that do not get over being stopped for itself."""
    taking = [name for name in names if not SYSTEMS[name].whole]
    return [each for each in (taking, *([name] for name in names if SYSTEMS[name].whole)) if each]


def _real(name: str, cases: Sequence[SlowCase], wire: Wire, outcome: Outcome) -> list[Curve]:
    """The curves of a system that adapts to the link, trained over it, where that is affordable."""
    if not SYSTEMS[name].adapts or outcome.note or min(outcome.values) * cases[0].steps > REAL_S:
        return []
    say(f"  training {name} over {wire}")
    try:
        return [learn(name, case, wire) for case in cases]
    except Lost as why:
        say(f"  {name}: {why}")
        outcome.note = f"while it was trained over this link: {why}"
        return []


def _rounds(wire: Wire) -> int:
    return FEW_ROUNDS if wire.rate_mbit is not None and wire.rate_mbit < FEW_BELOW_MBIT else ROUNDS


def _missing(wire: Wire, name: str, why: str) -> Row:
    return missing(str(wire), name, "tokens_per_s", "1/s", "higher", why)
