"""Interleaved rounds: every system has one turn a round, and the order moves on, so that drift meets all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


class Lost(Exception):
    """A system did not finish its turn: it hung past its deadline, or it died. The message says which."""


@dataclass
class Outcome:
    """One value a round; the worst possible one from the round on in which the system was lost, and `note` says why."""

    values: list[float] = field(default_factory=list)
    note: str | None = None


def order(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: rotated on every second round, backwards in between, so neighbours change too."""
    shift = number // 2 % len(names) if names else 0
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if number % 2 else turned


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """`(round, system)` in the order of play."""
    for number in range(rounds):
        for name in order(names, number):
            yield number, name


def play(
    names: Sequence[str], rounds: int, turn: Callable[[str], float], *, worst: float = math.inf
) -> dict[str, Outcome]:
    """Play all rounds. `turn(name)` returns the round's value or raises Lost, after which that system plays no more.

    `worst` is what a lost round counts: infinite seconds, or a rate of 0.
    """
    outcomes = {name: Outcome() for name in names}
    for number, name in turns(names, rounds):
        outcome = outcomes[name]
        if outcome.note is not None:
            outcome.values.append(worst)
            continue
        try:
            outcome.values.append(turn(name))
        except Lost as lost:
            outcome.values.append(worst)
            outcome.note = f"round {number + 1}: {lost}"
    return outcomes
