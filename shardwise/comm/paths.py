"""`Paths`: one or several links between hosts, measured, and the algorithms chosen and shared out by what they cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.wire import Combine, Wire
from shardwise.comm.worker import Worker
from shardwise.spec.collective_cost import Path, Share, shape, split

PROBE_S = 0.15  # what the probe of all links together takes, about
PROBED_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
ENOUGH_S = 0.01  # a transfer that takes so much longer than a small one tells the bandwidth
MESSAGE_S = 30e-6  # what a message keeps its ends busy, where the link is too long to tell
EVERY = 32  # transfers between two looks at how long they took; the first looks come sooner
PIECES = ("all_gather", "reduce_scatter")  # whose tensors hold a piece for each member


class Paths:
    """The links between the hosts of a group. Every member of a collective must call it, in the same order.

    `paths` is what is known of each; `only` names the algorithm to take instead of the cheapest. `failed` is called,
    from a thread of its own, when one of several links has failed while others still wait.
    """

    def __init__(
        self, wires: Sequence[Wire], paths: Sequence[Path], failed: Callable[[Exception], None] = lambda error: None
    ) -> None:
        self.wires = list(wires)
        self.paths = tuple(paths)
        self.only: str | None = None
        self._known: dict[tuple[tuple[int, ...], int], list[Path]] = {}
        self._transfers: dict[tuple[tuple[int, ...], int], int] = {}
        self._workers = [Worker(f"path {i}", failed) for i in range(1, len(self.wires))]

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop(0)

    def run(
        self,
        collective: str,
        tensor: Tensor,
        members: tuple[int, ...],
        place: int,
        *,
        combine: Combine | None = None,
        root: int = 0,
        sharing: int = 1,
    ) -> None:
        """This rank's part of a collective between `members` (ranks of the group), of which it is number `place`.

        `tensor` is 1-D and contiguous, as `Wire.run` takes it. `sharing` ranks of this host use the links at once.
        Raises LinkFailure.
        """
        key = (members, sharing)
        known = self._known.setdefault(key, [path.shared(sharing) for path in self.paths])
        chosen = split(collective, tensor.nbytes, len(members), known, only=self.only)
        rows = len(members) if collective in PIECES else 1
        parts = _parts(tensor, rows, chosen.shares)
        took = [0.0] * len(self.wires)

        def transfer(share: Share, part: Tensor) -> None:
            began = time.perf_counter()
            self.wires[share.path].run(
                collective,
                chosen.algorithm,
                part,
                members,
                place,
                combine=combine,
                root=root,
                segments=share.segments,
            )
            took[share.path] = time.perf_counter() - began

        first, *others = zip(chosen.shares, parts, strict=True)
        jobs = [self._worker(share).submit(partial(transfer, share, part)) for share, part in others]
        transfer(*first)
        for job in jobs:
            job.wait()
        if len(parts) > 1 and rows > 1:
            _put_back(tensor, rows, parts)
        self._look(key, collective, chosen.algorithm, chosen.shares, took, place)

    def _worker(self, share: Share) -> Worker:
        return self._workers[share.path - 1]

    def _look(
        self,
        key: tuple[tuple[int, ...], int],
        collective: str,
        algorithm: str,
        shares: Sequence[Share],
        took: Sequence[float],
        place: int,
    ) -> None:
        """Learn the bandwidths from transfers that they decided: the first, second, fourth ..., then every EVERY-th.

        The members agree on the longest time of each path, so they go on choosing alike.
        """
        members, _ = key
        known = self._known[key]
        about = shape(collective, algorithm, len(members))
        start = [about.rounds * p.latency_s + about.messages * p.message_s for p in known]
        if any(about.seconds(s.nbytes, known[s.path], s.segments) < 4 * start[s.path] for s in shares):
            return
        count = self._transfers[key] = self._transfers.get(key, 0) + 1
        if count & (count - 1) if count < EVERY else count % EVERY:
            return
        agreed = torch.tensor(took, dtype=torch.float64)
        _agree(self.wires[shares[0].path], agreed, members, place)
        for share in shares:
            path, seconds = known[share.path], float(agreed[share.path]) - start[share.path]
            predicted = about.seconds(share.nbytes, path, share.segments) - start[share.path]
            if seconds > 0:
                nearer = predicted / seconds if count == 1 else math.sqrt(predicted / seconds)
                known[share.path] = path._replace(bandwidth=path.bandwidth * nearer)


def measure(wires: Sequence[Wire], store: dist.Store, members: tuple[int, ...], rank: int) -> list[Path]:
    """What each link costs. `members` is a rank of each host; those measure, all together, and tell the others.

    Takes about PROBE_S, and one small transfer of each link where that is slow. Raises LinkFailure.
    """
    if rank in members:
        place = members.index(rank)
        found = [_probe(wire, members, place, PROBE_S / len(wires)) for wire in wires]
        if place == 0:
            store.set("measured", json.dumps(found))
    return [Path(*each) for each in json.loads(store.get("measured"))]


def _probe(wire: Wire, members: tuple[int, ...], place: int, budget_s: float) -> Path:
    """All times are the longest of any member, so all members decide alike when to stop."""
    end = time.perf_counter() + budget_s

    def timed(nbytes: int, count: int = 1) -> float:
        _agree(wire, torch.zeros(2, dtype=torch.float64), members, place)  # all begin together
        began = time.perf_counter()
        _pass_on(wire, members, place, nbytes, count)
        now = time.perf_counter()
        took = torch.tensor([now - began, now - end], dtype=torch.float64)
        _agree(wire, took, members, place)
        left.append(-float(took[1]))
        return float(took[0])

    left: list[float] = []
    timed(8)
    small = timed(8)
    for _ in range(3):
        if left[-1] > 10 * small:
            small = min(small, timed(8))
    message = MESSAGE_S
    if left[-1] > 20 * small:
        message = max(1e-6, min((timed(8, 9) - small) / 8, small / 2))  # messages that were held up say little
    before, bandwidth = (0, 0.0), 1e6
    for nbytes in PROBED_BYTES:
        whole = timed(nbytes)
        seconds = max(whole - small, whole / 4)  # a small message that was held up says little
        gained = seconds - before[1]
        bandwidth = (nbytes - before[0]) / gained if gained > seconds / 4 else nbytes / seconds
        before = nbytes, seconds
        if seconds > ENOUGH_S or left[-1] < 3 * seconds:
            break
    return Path(max(small - message, 1e-6), bandwidth, message, _add_s(wire, members, place))


def _pass_on(wire: Wire, members: tuple[int, ...], place: int, nbytes: int, count: int) -> None:
    """Everybody sends to the next member and receives from the one before, `count` times at once."""
    sent = torch.zeros(nbytes, dtype=torch.uint8)
    following, previous = members[(place + 1) % len(members)], members[place - 1]
    works = [wire.receive(torch.empty_like(sent), previous) for _ in range(count)]
    works += [wire.send(sent, following) for _ in range(count)]
    for work in works:
        work.wait()


def _agree(wire: Wire, values: Tensor, members: tuple[int, ...], place: int) -> None:
    """The largest of all members' in each place."""
    algorithm = "flat" if len(members) <= 8 else "halving_doubling"
    wire.run("all_reduce", algorithm, values, members, place, combine=torch.maximum)


def _add_s(wire: Wire, members: tuple[int, ...], place: int) -> float:
    """Seconds to add a byte, where the sum stays in the cache."""
    numbers = torch.zeros(1 << 16)
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        numbers.add_(numbers)
        best = min(best, time.perf_counter() - began)
    agreed = torch.tensor([best / numbers.nbytes], dtype=torch.float64)
    _agree(wire, agreed, members, place)
    return float(agreed)


def _parts(tensor: Tensor, rows: int, shares: Sequence[Share]) -> list[Tensor]:
    """The tensor's part for each share: a slice of it, or copies of a slice of each of its `rows`."""
    if len(shares) == 1:
        return [tensor]
    table = tensor.view(rows, -1)
    width, size = table.shape[1], tensor.element_size()
    cuts, before = [0], 0
    for share in shares:
        before += share.nbytes
        cuts.append(before // size // rows)
    cuts[-1] = width
    return [table[:, a:b].reshape(-1) for a, b in zip(cuts, cuts[1:], strict=False)]


def _put_back(tensor: Tensor, rows: int, parts: Sequence[Tensor]) -> None:
    at = 0
    for part in parts:
        width = part.numel() // rows
        tensor.view(rows, -1)[:, at : at + width] = part.view(rows, width)
        at += width
