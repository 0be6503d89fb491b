"""`auto`: which synchronisation a job should use, from what was measured on its first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from shardwise.spec.sync import Sync

ENOUGH = 0.95  # expected of the rate without any synchronisation: what is reached is a few per cent less
CODED_BYTES = {8: 1.01, 4: 0.53, 2: 0.26}  # of an element in so many bits, with its share of the block's scale
SUM_S, MEET_S = 3.5e-9, 1.7e-9  # seconds to encode, decode and apply an element of a sum, of replicas that meet
SENDING_S = 1.6e-3  # seconds that a message of 130 KB over gloo takes from what its core computes
# Steps of a replica between two meetings, bits, and fragments that take turns. What is sent arrives a step later: of a
# GPT of 1 M parameters the second step of delay cost more held-out loss than another step between two meetings.
LOCAL: tuple[tuple[int, Literal[8, 4, 2], int], ...] = ((2, 8, 1), (2, 4, 1), (4, 4, 2), (4, 2, 2), (4, 2, 4))
# Of the compute measured in exact steps, in which the core also sends: 38 ms were 28 ms without, and what should take
# 23 ms on the link took 31 beside a step.
HIDES = 0.5
BETA1, BETA2 = 0.8, 0.99  # bounds of Adam's betas while replicas step on their own
CHECK_SHARE = 0.01  # of the time may go into exact steps that only check


class Measured(NamedTuple):
    """Of the first steps, the same on all ranks: seconds of compute (the slowest rank's) and of the whole step in
    exact mode; of the link, seconds a message and bytes/s of an all-reduce's payload; what is to be sent. `moments`:
    whether an optimizer has Adam's betas."""

    compute_s: float
    step_s: float
    latency_s: float
    bandwidth: float
    elements: int
    ranks: int
    moments: bool


class Choice(NamedTuple):
    """What to use, how many steps lie between two exact ones that check it (0: none), and why."""

    sync: Sync
    check_every: int
    why: str


def choose(measured: Measured, allow: Sequence[str], exact: Sync) -> Choice:
    """The word that changes the numbers least among those that reach ENOUGH of the rate without synchronisation; where
    none does, the fastest. `exact` is what the run began with; `allow` has the words that the job permits.
    """
    rates = rates_of(measured, allow, exact)
    chosen = next((sync for sync, rate in rates.items() if rate >= ENOUGH), max(rates, key=lambda sync: rates[sync]))
    exact_s = measured.elements * 4 / measured.bandwidth + 2 * measured.latency_s
    meetings = 2 if chosen.word == "local" else 1  # replicas first meet
    check = 0 if chosen == exact else math.ceil(meetings * exact_s / (CHECK_SHARE * measured.compute_s))
    return Choice(chosen, check, _why(measured, chosen, rates))


def rates_of(measured: Measured, allow: Sequence[str], exact: Sync) -> dict[Sync, float]:
    """What one expects of `exact` and of all that `allow` permits, gentlest first: the share of the rate without any
    synchronisation."""
    rates = {exact: measured.compute_s / measured.step_s}
    if "compressed" in allow:
        coded = Sync(word="compressed", method="int8", bucket_bytes=exact.bucket_bytes)
        rates[coded] = _rate(measured, every=1, bits=8, overlap=0, fragments=1, code_s=SUM_S)
    if "local" in allow:
        for every, bits, fragments in LOCAL:
            sync = _local(every, bits, fragments, moments=measured.moments)
            rates[sync] = _rate(measured, every=every, bits=bits, overlap=1, fragments=fragments, code_s=MEET_S)
    return rates


def _local(every: int, bits: Literal[8, 4, 2], fragments: int, *, moments: bool) -> Sync:
    beta1, beta2 = (BETA1, BETA2) if moments else (0.0, 0.0)
    every_word = {"every": every, "bits": bits, "overlap": 1, "beta1": beta1, "beta2": beta2}
    turns = {"method": "streaming", "fragments": fragments, "outer_lr": 1.0, "outer_momentum": 0.0}
    return Sync(word="local", **every_word, **(turns if fragments > 1 else {"method": "sgd"}))  # type: ignore[arg-type]


def _rate(measured: Measured, *, every: int, bits: int, overlap: int, fragments: int, code_s: float) -> float:
    """Of the rate without synchronisation, where `every` steps share `fragments` messages and half of `overlap` steps'
    compute hides each."""
    sent = measured.elements / fragments * CODED_BYTES[bits] * (measured.ranks - 1)
    exposed_s = fragments * max(
        0.0, sent / measured.bandwidth + measured.latency_s - HIDES * overlap * measured.compute_s
    )
    alone_s = every * measured.compute_s
    return alone_s / (alone_s + measured.elements * code_s + fragments * SENDING_S + exposed_s)


def _why(measured: Measured, chosen: Sync, rates: dict[Sync, float]) -> str:
    shares = ", ".join(f"{_called(sync)} {rate:.0%}" for sync, rate in rates.items())
    return (
        f"a step computes for {measured.compute_s * 1e3:.1f} ms and took {measured.step_s * 1e3:.1f} ms; the link "
        f"carries {measured.bandwidth * 8 / 1e6:.0f} Mbit/s with {measured.latency_s * 1e3:.2f} ms a message. Of the "
        f"rate without synchronisation one expects: {shares}. So: {_called(chosen)}."
    )


def _called(sync: Sync) -> str:
    steps = f" every {sync.every} steps in {sync.bits} bits" if sync.word == "local" else ""
    if sync.method == "streaming":
        steps += f" and {sync.fragments} fragments"
    return " ".join(filter(None, (sync.word, sync.method))) + steps
