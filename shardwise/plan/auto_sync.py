"""`auto`: which synchronisation a job should use, from what was measured on its first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shardwise.spec.sync import Sync

ENOUGH = 0.95  # of the rate without any synchronisation: more is not worth changing the numbers for
CODED_BYTES = 1.01  # of an element as int8 with its share of the block's scale
CODING_S = 2.5e-9  # seconds to encode and decode an element, on one core
MOST_STEPS = 128  # of a replica between two meetings: beyond this they drift too far apart
CHECK_SHARE = 0.02  # of the time may go into exact steps that only check


class Measured(NamedTuple):
    """Of the first steps, the same on all ranks: seconds of compute (the slowest rank's) and of the whole step in
    exact mode; of the link, seconds a message and bytes/s of an all-reduce's payload; what is to be sent."""

    compute_s: float
    step_s: float
    latency_s: float
    bandwidth: float
    elements: int
    ranks: int


class Choice(NamedTuple):
    """What to use, how many steps lie between two exact ones that check it (0: none), and why."""

    sync: Sync
    check_every: int
    why: str


def choose(measured: Measured, allow: Sequence[str], exact: Sync) -> Choice:
    """The word that changes the numbers least among those that reach ENOUGH of the rate without synchronisation; where
    none does, the fastest. `exact` is what the run began with; `allow` has the words that the job permits.
    """
    whole_s = measured.elements * 4 / measured.bandwidth + 2 * measured.latency_s
    rates = {"all_reduce": measured.compute_s / measured.step_s}
    syncs = {"all_reduce": exact}
    coded_s = measured.elements * (CODED_BYTES / measured.bandwidth + CODING_S) + measured.latency_s
    if "compressed" in allow:
        syncs["compressed"] = Sync(word="compressed", method="int8", bucket_bytes=exact.bucket_bytes)
        rates["compressed"] = measured.compute_s / (measured.compute_s + coded_s)
    if "local" in allow:
        every = min(MOST_STEPS, math.ceil(coded_s / measured.compute_s / (1 / ENOUGH - 1)))
        syncs["local"] = Sync(word="local", method="diloco", every=max(2, every), bits=8)
        rates["local"] = measured.compute_s / (measured.compute_s + coded_s / max(2, every))
    word = next((w for w in syncs if rates[w] >= ENOUGH), max(rates, key=lambda w: rates[w]))
    check = 0 if word == "all_reduce" else math.ceil(whole_s / (CHECK_SHARE * measured.compute_s))
    return Choice(syncs[word], check, _why(measured, word, rates, syncs[word]))


def _why(measured: Measured, word: str, rates: dict[str, float], sync: Sync) -> str:
    shares = ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items())
    chosen = word + (f" ({sync.method}, every {sync.every} steps)" if word == "local" else "")
    return (
        f"a step computes for {measured.compute_s * 1e3:.1f} ms and took {measured.step_s * 1e3:.1f} ms; the link "
        f"carries {measured.bandwidth * 8 / 1e6:.0f} Mbit/s with {measured.latency_s * 1e3:.2f} ms a message. Of the "
        f"rate without synchronisation one expects: {shares}. So: {chosen}."
    )
