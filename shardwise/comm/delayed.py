"""`Delayed`: sums that arrive a step late, so that they cross the link while the next step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.comm.exchange import Bucketed, Exchange, Pending

BODY, TAIL = "late.", "late tail"


class Flat(NamedTuple):
    """A copy of one bucket: all of it, its gradients, its tail."""

    flat: Tensor
    body: Tensor
    tail: Tensor


class Delayed:
    """An `Exchange` whose `wait` gives the sums of the step before ("Delayed gradient averaging", Zhu et al. 2021).

    A thread does what `inner` does, over a group that nobody else uses. The first `start` steps are exact and wait, and
    so is a step while `exact` is true. In the step after them nothing arrives: body and tail are zero. On another
    number of ranks what was on its way is lost.
    """

    def __init__(self, inner: Exchange, *, start: int = 1) -> None:
        self._inner = inner
        self._start = max(1, start)  # the buckets are laid out anew after the first step
        self._steps = 0
        self._buckets: Sequence[Bucketed] = ()
        self._filling: list[Flat] = []
        self._spare: list[list[Flat]] = []
        self._under_way: _Step | None = None
        self._due: _Step | None = None
        self._worker = _Worker()
        self.exact = False

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        """See `Exchange.arrange`."""
        kept = self._named()
        self._inner.arrange(buckets)
        self._buckets = buckets
        self._under_way = self._arrived(kept)
        self._spare = []

    def start(self, number: int, flat: Tensor, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        """See `Exchange.start`."""
        last = number == len(self._buckets) - 1
        if number == 0:
            self._steps += 1
            self._filling = self._spare.pop() if self._spare else []
        if len(self._filling) == number:
            copy = torch.empty_like(flat)
            self._filling.append(Flat(copy, copy[: body.numel()], copy[body.numel() :]))
        self._filling[number].flat.copy_(flat)
        if last:
            exact = self.exact or self._steps <= self._start
            step = _Step(self._inner, self._filling, mean=mean, exact=exact)
            self._worker.do(step)
            if exact:
                self._due = step
            else:
                self._due, self._under_way = self._under_way, step
        return _Arrival(self, number, flat)

    def hand_out(self, number: int, flat: Tensor) -> None:
        """The sums that are due, into the reducer's bucket; waits for them."""
        if self._due is None:
            flat.zero_()
            return
        flat.copy_(self._due.result()[number].flat)
        if number == len(self._buckets) - 1:
            self._spare.append(self._due.flats)
            self._due = None

    def state(self) -> dict[str, Tensor]:
        """What `inner` keeps, and what is on its way: the same on every rank."""
        late = self._named()
        return {**self._inner.state(), **late}

    def load_state(self, ranks: Sequence[Mapping[str, Tensor]], rank: int) -> None:
        """See `Exchange.load_state`."""
        self._named()
        own = (BODY, TAIL)
        self._inner.load_state([{n: t for n, t in state.items() if not n.startswith(own)} for state in ranks], rank)
        self._steps = self._start  # the exact steps are behind
        self._under_way = self._arrived(ranks[0] if ranks else {})

    def close(self) -> None:
        """End the thread."""
        self._worker.close()

    def _named(self) -> dict[str, Tensor]:
        """What is on its way, once it has arrived: gradients by parameter, and the tail."""
        found: dict[str, Tensor] = {}
        if self._under_way is None:
            return found
        flats = self._under_way.result()
        for bucket, flat in zip(self._buckets, flats, strict=True):
            found |= {BODY + name: view.clone() for name, view in _views(bucket, flat.body)}
        return found | {TAIL: flats[-1].tail.clone()}

    def _arrived(self, named: Mapping[str, Tensor]) -> _Step | None:
        """A step with these results in the buckets as they are laid out now; None where they do not fit."""
        if TAIL not in named or any(BODY + p.name not in named for b in self._buckets for p in b.pieces):
            return None
        flats = []
        for number, bucket in enumerate(self._buckets):
            tail = named[TAIL] if number == len(self._buckets) - 1 else named[TAIL][:0]
            flat = torch.zeros(bucket.numel + tail.numel(), dtype=bucket.dtype, device=bucket.device)
            one = Flat(flat, flat[: bucket.numel], flat[bucket.numel :])
            one.tail.copy_(tail)
            for name, view in _views(bucket, one.body):
                view.copy_(named[BODY + name])
            flats.append(one)
        return _Step(self._inner, flats, mean=False, ended=True)


def _views(bucket: Bucketed, body: Tensor) -> list[tuple[str, Tensor]]:
    return [(p.name, body[p.offset : p.offset + torch.Size(p.shape).numel()].view(p.shape)) for p in bucket.pieces]


class _Step:
    """The exchange of one step's buckets, done by the worker."""

    def __init__(
        self, inner: Exchange, flats: list[Flat], *, mean: bool, exact: bool = False, ended: bool = False
    ) -> None:
        self.flats = flats
        self._inner = inner
        self._mean = mean
        self._exact = exact
        self._ended = threading.Event()
        if ended:
            self._ended.set()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._inner.exact = self._exact
            works = [self._inner.start(i, *each, mean=self._mean) for i, each in enumerate(self.flats)]
            for work in works:
                work.wait()
        except BaseException as error:
            self._error = error
        self._ended.set()

    def result(self) -> list[Flat]:
        """Wait for it: as long as the group's own limit lets its operations take. Raises what it raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self.flats


class _Arrival:
    """What the reducer waits for."""

    def __init__(self, owner: Delayed, number: int, flat: Tensor) -> None:
        self._owner = owner
        self._number = number
        self._flat = flat

    def wait(self) -> None:
        self._owner.hand_out(self._number, self._flat)


class _Worker:
    """A thread that does one step's exchange after the other."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, step: _Step) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="delayed sums")
            self._thread.start()
        self._queue.put(step)

    def _run(self) -> None:
        while (step := self._queue.get()) is not None:
            step.run()

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
