"""A system of `slow_link` at work: launched at both ends of a link, then timed in turns, or trained to its end."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bench import apart
from bench.curves import Curve
from bench.line import Message
from bench.netns import Link, Wire
from bench.options import say
from bench.rounds import Lost
from bench.slow_case import SlowCase
from bench.slow_systems import RANKS, SYSTEMS, System
from bench.subject import Subject

EVERY = 75  # steps between two looks at the held-out loss
CHECK_TURN_S = 100.0  # how long a turn may be made for the sake of a check in it
WARM_UP = 50  # steps at the beginning of a turn that are not timed: a period, if that is shorter
SETTLE = 3  # steps at first that are not like the others
START_S, STEP_S = 120.0, 10.0  # deadlines: to start both ranks, and for a step
FIRST_PORT = 29500


def subject(name: str, system: System, link: Link, case: SlowCase) -> Subject:
    """The system at both ends of the link, not yet started."""
    cores = sorted(os.sched_getaffinity(0))
    env = apart.environment(link, FIRST_PORT + list(SYSTEMS).index(name))
    env |= replace(case, settings=system.settings).environment()
    env["SHARDWISE_TRANSPORT"] = "gloo"  # both ends are on one host, but memory that they share would be no slow link
    return Subject(name, apart.command(link, cores, system.module), ranks=RANKS, env=env, folder=case.folder)


@dataclass
class Player:
    """A system of a case: its ranks, and what their steps returned."""

    subject: Subject
    period: int  # steps after which what it sends repeats
    turn_s: float  # about how long the timed steps of a turn take; always whole periods
    whole: bool = False  # it goes on between its turns
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    told: Message = field(default_factory=dict)
    note: str | None = None

    def start(self, settle: int) -> None:
        """Start it, get past its first steps, and choose how many a turn has; a failure is noted."""
        try:
            self.subject.start(START_S)
            self.run(SETTLE + settle)
            self.told = told(self.subject)
            self.period = max(self.period, self.told.get("sync_chosen", {}).get("every", 0))
            step_s = self.run(self.period)
            self.steps = self._whole_periods(step_s)
            self._stop()
        except Lost as lost:
            say(f"  {self.subject.name}: {lost}")
            self.note = f"before the first round: {lost}"
            self.subject.close(grace_s=0)

    def _whole_periods(self, step_s: float) -> int:
        """Enough that a check of what `sync=auto` chose is in each turn, where that does not take too long."""
        with_check = self._check_every() * step_s
        wanted = max(self.turn_s, with_check if with_check <= CHECK_TURN_S else 0.0)
        return self.period * max(1, math.ceil(wanted / step_s / self.period))

    def turn(self) -> float:
        """A period to warm up and then whole ones; seconds a step. Raises Lost. Between turns it is stopped.

        The warm-up takes what was on its way when it was stopped, and arrived meanwhile.
        """
        try:
            self.subject.launched.thaw()
            warm = min(self.period, WARM_UP)
            seconds = self.run(warm + self.steps, skip=warm)
            self._stop()
        except Lost as lost:
            self.note = str(lost)
            self.subject.close(grace_s=0)
            raise
        return seconds

    def listen(self) -> None:
        """Ask what it has to say after the last round, unless it was lost."""
        if self.note is None:
            try:
                self.subject.launched.thaw()
                self.told = told(self.subject)
                if self.steps < (every := self._check_every()):
                    self.told["unchecked"] = every
            except Lost as lost:
                self.note = f"after the last round: {lost}"

    def _stop(self) -> None:
        if not self.whole:
            self.subject.launched.freeze()

    def _check_every(self) -> int:
        return int(self.told.get("sync_chosen", {}).get("check_every", 0))

    def run(self, steps: int, skip: int = 0) -> float:
        """Do steps; seconds a step of the slower rank, without the first `skip`. Raises Lost."""
        answers = self.subject.run(steps, START_S + STEP_S * steps)
        self.losses += losses(answers)
        return max(statistics.fmean(answer["seconds"][skip:]) for answer in answers)


def learn(name: str, case: SlowCase, wire: Wire) -> Curve:
    """Train the case to its end over such a wire, evaluating every `EVERY` steps. Raises Lost."""
    curve = Curve()
    with Link(wire) as link:
        system = subject(name, SYSTEMS[name], link, case)
        try:
            system.start(START_S)
            while len(curve.training) < case.steps:
                steps = min(EVERY, case.steps - len(curve.training))
                answers = system.run(steps, START_S + STEP_S * steps)
                held_out = system.ask({"do": "evaluate"}, START_S)
                seconds = max(sum(answer["seconds"]) for answer in answers)
                curve.add(losses(answers), seconds, statistics.fmean(each["loss"] for each in held_out))
        finally:
            system.close()
    return curve


def told(subject: Subject) -> Message:
    """What the ranks have to say, together. Raises Lost."""
    found: Message = {}
    for answer in subject.ask({"do": "tell"}, START_S):
        found |= answer
    return found


def losses(answers: Sequence[Message]) -> list[float]:
    """The loss of every step, the mean over the ranks."""
    return [statistics.fmean(each) for each in zip(*(answer["losses"] for answer in answers), strict=True)]
