"""`auto`: which synchronisation a job should use, from what was measured on its first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from shardwise.spec.sync import Sync

ENOUGH = 0.92  # of the rate without any synchronisation: more is not worth changing the numbers for
CODED_BYTES = {8: 1.01, 4: 0.53}  # of an element in so many bits, with its share of the block's scale
CODING_S = 5e-9  # seconds to encode, decode and apply an element, on one core
# Steps of a replica between two meetings, and bits. 1,500 steps of a GPT of 1 M parameters with 2 samples a rank ended
# 0.6 % below all_reduce's held-out loss with 2 steps, 0.3 % above it with 4 in 4 bits, 4 % above it with 10.
LOCAL: tuple[tuple[int, Literal[8, 4]], ...] = ((2, 8), (2, 4), (4, 8), (4, 4))
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
    rates = {exact: measured.compute_s / measured.step_s}
    if "compressed" in allow:
        coded = Sync(word="compressed", method="int8", bucket_bytes=exact.bucket_bytes)
        rates[coded] = _rate(measured, every=1, bits=8, overlap=0)
    if "local" in allow:
        for every, bits in LOCAL:
            overlap = every // 2
            sync = Sync(word="local", method="sgd", every=every, bits=bits, overlap=overlap)
            rates[sync] = _rate(measured, every=every, bits=bits, overlap=overlap)
    chosen = next((sync for sync, rate in rates.items() if rate >= ENOUGH), max(rates, key=lambda sync: rates[sync]))
    exact_s = measured.elements * 4 / measured.bandwidth + 2 * measured.latency_s
    meetings = 2 if chosen.word == "local" else 1  # replicas first meet
    check = 0 if chosen == exact else math.ceil(meetings * exact_s / (CHECK_SHARE * measured.compute_s))
    return Choice(chosen, check, _why(measured, chosen, rates))


def _rate(measured: Measured, *, every: int, bits: int, overlap: int) -> float:
    """Of the rate without synchronisation, where `every` steps share a message that `overlap` of them hide."""
    link_s = measured.elements * CODED_BYTES[bits] * (measured.ranks - 1) / measured.bandwidth + measured.latency_s
    exposed_s = max(0.0, link_s - overlap * measured.compute_s)
    alone_s = every * measured.compute_s
    return alone_s / (alone_s + measured.elements * CODING_S + exposed_s)


def _why(measured: Measured, chosen: Sync, rates: dict[Sync, float]) -> str:
    shares = ", ".join(f"{_called(sync)} {rate:.0%}" for sync, rate in rates.items())
    return (
        f"a step computes for {measured.compute_s * 1e3:.1f} ms and took {measured.step_s * 1e3:.1f} ms; the link "
        f"carries {measured.bandwidth * 8 / 1e6:.0f} Mbit/s with {measured.latency_s * 1e3:.2f} ms a message. Of the "
        f"rate without synchronisation one expects: {shares}. So: {_called(chosen)}."
    )


def _called(sync: Sync) -> str:
    steps = f" every {sync.every} steps in {sync.bits} bits" if sync.word == "local" else ""
    return " ".join(filter(None, (sync.word, sync.method))) + steps
