"""Measure what a group's transport reaches: latency and bandwidth of every pair, and seconds of each collective."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from shardwise.comm.collectives import gather_bytes, largest
from shardwise.comm.group import Group
from shardwise.spec.cluster import Calibration, Link, Pair

SIZES = tuple(1 << power for power in (10, 13, 16, 19, 22, 25))  # bytes of the whole tensor
BLOCKS = 9  # of calls, whose median counts: one disturbed block moves nothing
MOST_CALLS = 200  # in a block
CELL_S = 2.0  # a size that would take longer, by the one before, is left out, and all larger ones
PING_BYTES, TRIAL_BYTES, MESSAGE_BYTES = 8, 64 << 10, 8 << 20
ALONE_UP_TO = 16  # ranks: with more, disjoint pairs are measured at once
Call = Callable[[], object]


class Bench(NamedTuple):
    """The group to measure, and where its tensors are."""

    group: Group
    device: torch.device

    def zeros(self, nbytes: int) -> Tensor:
        """float32 zeros; the memory is where gradient buckets are."""
        return self.group.zeros(max(1, nbytes // 4), torch.float32, self.device)

    def seconds(self, call: Call, calls: int) -> float:
        """Of one of several calls, one after the other."""
        self._settle()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        self._settle()
        return (time.perf_counter() - began) / calls

    def slowest(self, seconds: float) -> float:
        return largest([seconds], self.group, self.device)[0]

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def calibrate(group: Group, device: torch.device, *, budget_s: float = 9.0) -> Calibration:
    """Measure `group` in about `budget_s` seconds (on slow links at most four times that). Collective; all get it.

    Sizes are bytes of the whole tensor, float32. A collective's seconds are those of the slowest rank, the median of
    BLOCKS blocks of calls. Raises CommError when a rank is lost.
    """
    bench = Bench(group, device)
    pairs = _pairs(bench, budget_s / 4)
    cells = len(OPERATIONS) * len(SIZES) + 1
    found = {name: tuple(_sizes(bench, name, budget_s * 3 / 4 / cells)) for name in OPERATIONS}
    barrier = _collective(bench, lambda: group.barrier().wait(), budget_s * 3 / 4 / cells)
    return Calibration(
        backend=group.transport, ranks=group.size(), pairs=pairs, collectives={**found, "barrier": ((0, barrier),)}
    )


# Collectives.


def _all_reduce(bench: Bench, nbytes: int) -> Call:
    tensor = bench.zeros(nbytes)
    return lambda: bench.group.all_reduce(tensor).wait()


def _all_gather(bench: Bench, nbytes: int) -> Call:
    whole, piece = _whole_and_piece(bench, nbytes)
    return lambda: bench.group.all_gather_single(whole, piece).wait()


def _reduce_scatter(bench: Bench, nbytes: int) -> Call:
    whole, piece = _whole_and_piece(bench, nbytes)
    return lambda: bench.group.reduce_scatter_single(piece, whole).wait()


def _broadcast(bench: Bench, nbytes: int) -> Call:
    """Every rank in turn is the root: none can run ahead of the others."""
    tensor, roots = bench.zeros(nbytes), _turns(bench.group.size())
    return lambda: bench.group.broadcast([tensor], root=next(roots)).wait()


def _all_to_all(bench: Bench, nbytes: int) -> Call:
    whole, _ = _whole_and_piece(bench, nbytes)
    arrived = torch.empty_like(whole)
    return lambda: bench.group.all_to_all_single(arrived, whole, [], []).wait()


OPERATIONS: dict[str, Callable[[Bench, int], Call]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
}


def _whole_and_piece(bench: Bench, nbytes: int) -> tuple[Tensor, Tensor]:
    piece = torch.zeros(max(1, nbytes // 4 // bench.group.size()), device=bench.device)
    return torch.zeros(piece.numel() * bench.group.size(), device=bench.device), piece


def _turns(size: int) -> Iterator[int]:
    while True:
        yield from range(size)


def _sizes(bench: Bench, name: str, budget_s: float) -> Iterator[tuple[int, float]]:
    last = (0, 0.0)
    for nbytes in SIZES:
        if last[0] and last[1] * nbytes / last[0] * (BLOCKS + 2) > CELL_S:
            return
        last = nbytes, _collective(bench, OPERATIONS[name](bench, nbytes), budget_s)
        yield last


def _collective(bench: Bench, call: Call, budget_s: float) -> float:
    bench.seconds(call, 1)  # the first call of a size sets buffers up
    once = bench.slowest(bench.seconds(call, 1))  # the same on every rank, and so is the number of calls
    calls = max(1, min(MOST_CALLS, int(budget_s / BLOCKS / once)))
    return bench.slowest(statistics.median(bench.seconds(call, calls) for _ in range(BLOCKS)))


# Pairs.


def _pairs(bench: Bench, budget_s: float) -> tuple[Pair, ...]:
    group, mine = bench.group, list[Pair]()
    rounds = list(pair_rounds(group.size(), at_once=group.size() > ALONE_UP_TO))
    for pairs in rounds:
        group.barrier().wait()
        for source, target in pairs:
            if group.rank() == source:
                mine.append(_lead(bench, target, budget_s / len(rounds)))
            elif group.rank() == target:
                _follow(bench, source)
    told = gather_bytes(msgspec.json.encode(mine), group, bench.device)
    return tuple(pair for raw in told for pair in msgspec.json.decode(raw, type=list[Pair]))


def pair_rounds(ranks: int, *, at_once: bool) -> Iterator[list[tuple[int, int]]]:
    """Every `(source, target)` once, in rounds: one a round, or with `at_once` as many as have no rank in common.

    The rounds of a tournament: one rank stands still, the others move on around it (the circle method).
    """
    circle = list(range(ranks)) + [-1] * (ranks % 2)  # who meets -1 pauses
    half = len(circle) // 2
    for _ in range(len(circle) - 1):
        met = [(a, b) for a, b in zip(circle[:half], reversed(circle[half:]), strict=True) if min(a, b) >= 0]
        for pairs in (met, [(b, a) for a, b in met]):
            yield from [pairs] if at_once else [[pair] for pair in pairs]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _lead(bench: Bench, target: int, budget_s: float) -> Pair:
    """As the source: the latency is half of a round trip, the bandwidth that of a message and its short answer."""
    ping = torch.zeros(PING_BYTES, dtype=torch.uint8, device=bench.device)

    def there_and_back(message: Tensor) -> Call:
        def call() -> None:
            bench.group.send([message], target).wait()
            bench.group.recv([ping], target).wait()

        return call

    for message in (ping, ping.new_zeros(TRIAL_BYTES)):
        bench.seconds(there_and_back(message), 1)  # a first message may have to open the connection
    pings = max(3, min(MOST_CALLS, _calls(bench.seconds(there_and_back(ping), 1), budget_s / 4)))
    trial = bench.seconds(there_and_back(message), 1)
    size = TRIAL_BYTES
    while size < MESSAGE_BYTES and trial * 2 * size / TRIAL_BYTES * BLOCKS < budget_s * 3 / 4:
        size *= 2
    large = ping.new_zeros(size)
    bench.group.send([torch.tensor([pings, size], device=bench.device)], target).wait()
    round_trip = statistics.median(bench.seconds(there_and_back(ping), pings) for _ in range(BLOCKS))
    bench.seconds(there_and_back(large), 1)
    taken = statistics.median(bench.seconds(there_and_back(large), 1) for _ in range(BLOCKS))
    link = Link(latency_s=round_trip / 2, bandwidth=size / max(taken - round_trip, taken / 10), measured=True)
    return Pair(source=bench.group.rank(), target=target, link=link)


def _follow(bench: Bench, source: int) -> None:
    """As the target: answer whatever comes with a short message, in the order in which `_lead` sends."""
    ping = torch.zeros(PING_BYTES, dtype=torch.uint8, device=bench.device)

    def answer(message: Tensor, times: int) -> None:
        for _ in range(times):
            bench.group.recv([message], source).wait()
            bench.group.send([ping], source).wait()

    trial = ping.new_zeros(TRIAL_BYTES)
    for message in (ping, trial, ping, trial):
        answer(message, 1)
    told = torch.zeros(2, dtype=torch.int64, device=bench.device)
    bench.group.recv([told], source).wait()
    pings, size = told.tolist()
    answer(torch.zeros_like(ping), pings * BLOCKS)
    answer(ping.new_zeros(size), 1 + BLOCKS)


def _calls(once_s: float, budget_s: float) -> int:
    return int(budget_s / BLOCKS / once_s)
