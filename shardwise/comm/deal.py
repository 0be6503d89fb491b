"""How the samples of a clock are dealt to workers of unlike speed, so that their clocks stay in step. Pure.

A bound alone does not help against a worker that is always slow: once the others are `bound` clocks ahead of it they
go at its pace. So each worker gets samples in proportion to the speed that it was measured to have, and the bound is
left for what varies. Which samples a clock has does not change, only who computes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WINDOW = 4  # clocks of every worker that are measured before samples are dealt anew
CHANGE = 0.1  # a share that would change by less than this part of itself stays


class Deal(NamedTuple):
    """From clock `start` on worker w gets `shares[w]` of the samples of every clock."""

    start: int
    shares: tuple[float, ...]


class Report(NamedTuple):
    """A worker computed `samples` of a clock in `seconds`, waiting for servers not counted. It knows deal `seen`."""

    worker: int
    samples: int
    seconds: float
    seen: int


class Dealing(NamedTuple):
    """What was dealt so far, and what was measured since: reports, samples and seconds of each worker."""

    workers: int
    deals: tuple[Deal, ...]
    measured: Mapping[int, tuple[int, int, float]] = {}
    seen: Mapping[int, int] = {}


def open_dealing(workers: int, start: int) -> Dealing:
    """Everybody gets the same from clock `start` on."""
    return Dealing(workers, (Deal(start, (1 / workers,) * workers),))


def report(state: Dealing, said: Report, start: int) -> Dealing:
    """Take a report in; perhaps deal anew from clock `start`, which no worker may have reached.

    A new deal is made once every worker knows the last one and has computed WINDOW clocks since.
    """
    reports, samples, seconds = state.measured.get(said.worker, (0, 0, 0.0))
    measured = {**state.measured, said.worker: (reports + 1, samples + said.samples, seconds + said.seconds)}
    state = state._replace(measured=measured, seen={**state.seen, said.worker: said.seen})
    everybody = range(state.workers)
    newest = len(state.deals) - 1
    if any(state.seen.get(w, -1) < newest or measured.get(w, (0, 0, 0.0))[0] < WINDOW for w in everybody):
        return state
    if any(measured[w][1] == 0 or measured[w][2] <= 0 for w in everybody):
        return state  # one had no sample to be measured by: wait until it has
    speeds = [measured[w][1] / measured[w][2] for w in everybody]
    shares = tuple(speed / sum(speeds) for speed in speeds)
    state = state._replace(measured={})
    old = state.deals[-1].shares
    if all(abs(new - was) < CHANGE * was for new, was in zip(shares, old, strict=True)):
        return state
    return state._replace(deals=(*state.deals, Deal(start, shares)))


class Hands:
    """The samples of every clock in contiguous runs, one a worker, as the deals say: alike wherever it is computed.

    Everybody gets at least `least`.
    """

    def __init__(self, global_batch: int, deals: Sequence[Deal], least: int = 0) -> None:
        self._batch = global_batch
        self._least = least
        self._deals = list(deals)
        self._at = (deals[0].start, 0, [0.0] * len(deals[0].shares))  # the next clock, its deal, what is owed to each

    def add(self, deal: Deal) -> None:
        """Raises ValueError for a deal of clocks that have been asked for already."""
        if deal.start < self._at[0]:
            raise ValueError(f"a deal from clock {deal.start} on came after clock {self._at[0] - 1} was dealt")
        self._deals.append(deal)

    def of(self, clock: int) -> list[range]:
        """The run of each worker; clocks are asked for in ascending order, or again from an earlier one on."""
        if clock < self._at[0]:
            self._at = (self._deals[0].start, 0, [0.0] * len(self._deals[0].shares))
        while True:
            at, number, owed = self._at
            while number + 1 < len(self._deals) and self._deals[number + 1].start <= at:
                number, owed = number + 1, [0.0] * len(owed)
            sizes, owed = _sizes(self._batch, self._deals[number].shares, owed, self._least)
            self._at = (at + 1, number, owed)
            if at == clock:
                ends = list(itertools.accumulate(sizes))
                return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _sizes(batch: int, shares: Sequence[float], owed: Sequence[float], least: int) -> tuple[list[int], list[float]]:
    """Whole samples for each worker; what rounding kept from one is owed to it in the next clock."""
    due = [o + batch * share for o, share in zip(owed, shares, strict=True)]
    sizes = [max(least, int(d)) for d in due]
    for _ in range(abs(batch - sum(sizes))):
        missing = [d - size for d, size in zip(due, sizes, strict=True)]
        if sum(sizes) < batch:
            sizes[missing.index(max(missing))] += 1
        else:
            able = [m if size > least else float("inf") for m, size in zip(missing, sizes, strict=True)]
            sizes[able.index(min(able))] -= 1
    return sizes, [max(-2.0, min(2.0, d - size)) for d, size in zip(due, sizes, strict=True)]
