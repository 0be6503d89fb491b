"""`param_server`: the parameters of the replicas live on servers, which share the replicas' processes.

Synchronous replicas go in step through collectives; the others, through messages, by clocks (Li et al. 2014, Ho et al.
2013). The user's optimizers step what lies on this rank's server, and hold whole tensors again where somebody looks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from shardwise import events
from shardwise.comm.deal import Deal, Hands
from shardwise.comm.group import Group
from shardwise.comm.mesh import Axis
from shardwise.comm.param_optim import Rebased, elementwise
from shardwise.comm.param_server import Served, Terms, table_rows
from shardwise.comm.param_store import Push
from shardwise.comm.param_wire import Total
from shardwise.comm.param_worker import Worker
from shardwise.parallel.alone import Alone
from shardwise.parallel.reducer import Named, Reducer
from shardwise.parallel.served_reducer import ServedReducer
from shardwise.parallel.statistics import Totals
from shardwise.parallel.synchronise import Optimizers, Synchroniser, chosen_bucket_bytes
from shardwise.spec.sync import Sync

MARGIN = 8  # steps, beyond those that the loader makes ahead, before samples are dealt anew: some are on their way


class ServedUpdates(Synchroniser):
    """Replicas in step: gradients are summed by servers, each of which updates its pieces, and all get the values.

    What a step computes is what an all-reduce computes. The servers are opened by the first step, which knows the
    optimizers; `settle` closes them.
    """

    def __init__(
        self, named: Callable[[], Named], axis: Axis, sync: Sync, group: Group, *, tables: Sequence[str] = ()
    ) -> None:
        self._named = named
        self._axis = axis
        self._sync = sync
        self._group = group
        self._tables = tuple(tables)
        self._alone = Alone(named)
        self._gradients: ServedReducer | None = None
        self._served: Served | None = None
        self._rebased: Rebased | None = None
        self._schedule: Callable[[int], object] | None = None
        self._first = 0
        self._ahead = MARGIN
        self._exchange = None

    @property
    def reducer(self) -> Reducer | Alone:
        return self._gradients or self._alone

    def begin(self, step: int, schedule: Callable[[int], object], ahead: int) -> None:
        self._first, self._ahead = step, ahead + MARGIN

    def start_step(self, optimizers: Optimizers) -> bool:
        if self._served is None:
            self._open(optimizers)
        return True

    def _open(self, optimizers: Optimizers) -> None:
        stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in self._named() if id(p) in stepped}
        self._rebased = Rebased(optimizers, named)
        self._served = Served(
            named,
            self._group,
            self._terms(),
            self._rebased.put,
            tables=[name for name in self._tables if name in named],
            bucket_bytes=self._sync.bucket_bytes or chosen_bucket_bytes(list(named.items()), self._axis),
            cut=elementwise(optimizers),
            schedule=self._schedule,
            clock=self._first,
        )
        flats = self._served.flats
        dense: list[tuple[str, nn.Parameter]] = [(n, p) for n, p in named.items() if n in flats.grad_views]
        lockstep = self._served.lockstep
        settle = lockstep.settle if lockstep is not None else None
        self._gradients = ServedReducer(flats, lambda: dense, self._axis, self._send, settle)

    def _terms(self) -> Terms:
        return Terms("sync")

    def _send(self, flat: int) -> None:
        assert self._served is not None
        assert self._served.lockstep is not None
        self._served.lockstep.send(flat)

    def finish_step(self, optimizers: Optimizers, *, skipped: bool) -> float:
        assert self._gradients is not None
        assert self._served is not None
        assert self._served.lockstep is not None
        if not skipped:
            used = {number for number, name in enumerate(self._served.named) if name in self._gradients.used}
            self._served.lockstep.update(self._gradients.factor, used)
        return 0.0

    # What all agree on: the parameters, and the optimizers' state of all servers together.

    @contextlib.contextmanager
    def consistent(self, optimizers: Optimizers = ()) -> Iterator[None]:
        if self._served is None or not optimizers:
            yield
            return
        undo = self._whole(self._served)
        try:
            yield
        finally:
            undo()

    def settle(self, optimizers: Optimizers = ()) -> None:
        if self._served is not None:
            self._whole(self._served)
            self._served.close()
            self._forget()

    def close(self) -> None:
        served = self._served
        if served is not None:  # after an error, or the end of a loop that did not settle: nobody is waited for
            if self._group is not self._axis.group:
                self._group.abort("the replica of this rank was closed")
            served.flats.restore()
            assert self._rebased is not None
            self._rebased.drop()
        self._forget()
        self._alone.clear()

    def _whole(self, served: Served) -> Callable[[], None]:
        assert self._rebased is not None
        assert self._axis.group is not None
        return self._rebased.take(served.flats, served.number, self._axis.group)

    def _forget(self) -> None:
        if self._gradients is not None:
            self._gradients.clear()
            self._gradients.close()
        self._gradients = self._served = None


class ClockedUpdates(ServedUpdates):
    """Replicas by clocks of their own: asynchronous, of bounded staleness, or with backup workers.

    A step pulls, computes its gradient on what it got and pushes it; the loss that it reports is that of the newest
    clock that all have finished. Samples are dealt by measured speed, so that a bound is left for what varies.
    """

    clips = False
    schedules = True

    def __init__(
        self, named: Callable[[], Named], axis: Axis, sync: Sync, group: Group, *, tables: Sequence[str] = ()
    ) -> None:
        super().__init__(named, axis, sync, group, tables=tables)
        self._hands: Hands | None = None
        self._deals: list[Deal] = []
        self._given: dict[int, int] = {}  # samples of this rank in the steps that were made and not computed yet
        self._newest: Total | None = None
        self._begun = False

    @property
    def own_totals(self) -> bool:
        return True

    def told(self) -> Totals | None:
        return None if self._newest is None else Totals(self._newest.loss_sum, self._newest.weight, [])

    def begin(self, step: int, schedule: Callable[[int], object], ahead: int) -> None:
        super().begin(step, schedule, ahead)
        self._schedule = schedule

    def hands(self, global_batch: int, least: int) -> Callable[[int], range] | None:
        if self._sync.method == "sync":
            return None
        size, rank = self._axis.size, self._axis.rank
        self._deals = self._deals or [Deal(self._first, (1 / size,) * size)]
        hands = self._hands = Hands(global_batch, self._deals, least)

        def share(step: int) -> range:
            mine = hands.of(step)[rank]
            self._given[step] = len(mine)
            return mine

        return share

    def _terms(self) -> Terms:
        sync = self._sync
        return Terms(sync.method, sync.bound, sync.backup, ahead=self._ahead if self._hands is not None else 0)

    # A step.

    def start_step(self, optimizers: Optimizers) -> bool:
        super().start_step(optimizers)
        worker = self._worker()
        self._begun = False
        for name in self._tables_of(worker):
            worker.flats.named[name].grad = None
        on_time = worker.start()
        if not on_time:
            self._drop(worker.clock - 1)
        self._listen(worker)
        return on_time

    def _send(self, flat: int) -> None:
        if self._sync.backup:
            return  # nobody knows yet whether it counts
        if not self._begun:
            self._begun = True
            self._worker().begin()
        self._worker().send(flat)

    def finish_step(self, optimizers: Optimizers, *, skipped: bool) -> float:
        began = time.perf_counter()
        worker, gradients = self._worker(), self._reduced()
        samples = self._given.pop(worker.clock, 0)
        if self._sync.backup:
            if not worker.in_time():
                self._drop(worker.clock - 1)
                return time.perf_counter() - began
            worker.begin()
            for flat in range(len(worker.flats.grads)):
                worker.send(flat)
        if gradients.empty:
            worker.nothing(samples)
            return time.perf_counter() - began
        own = gradients.own
        used = {
            *gradients.used,
            *(name for name in self._tables_of(worker) if worker.flats.named[name].grad is not None),
        }
        said = Push(
            loss_sum=0.0 if skipped else own.loss_sum,
            weight=0.0 if skipped else own.weight,
            scale=1.0 / (own.weight * gradients.factor) if not skipped else 1.0,
            expected=self._newest.weight if self._newest is not None else own.weight * self._axis.size,
            used=tuple(name in used for name in worker.flats.named),
        )
        worker.finish(said, samples, {} if skipped else self._rows(worker))
        return time.perf_counter() - began

    def _rows(self, worker: Worker) -> dict[str, tuple[Tensor, Tensor]]:
        grads = {name: worker.flats.named[name].grad for name in self._tables_of(worker)}
        return {name: table_rows(name, grad) for name, grad in grads.items() if grad is not None}

    def _listen(self, worker: Worker) -> None:
        """What the leading server told: losses of finished clocks, and how samples are dealt from now on."""
        if worker.totals:
            self._newest = worker.totals[-1]
            worker.totals = []
        if self._hands is None:
            return
        for deal in worker.deals[len(self._deals) :]:
            self._deals.append(deal)
            self._hands.add(deal)
            if self._axis.rank == 0:
                events.emit("dealt", step=deal.start + 1, shares=[round(share, 4) for share in deal.shares])

    def _drop(self, clock: int) -> None:
        events.emit("gradient_dropped", step=clock + 1, rank=self._axis.rank)

    @contextlib.contextmanager
    def consistent(self, optimizers: Optimizers = ()) -> Iterator[None]:
        self._drain()
        with super().consistent(optimizers):
            yield

    def settle(self, optimizers: Optimizers = ()) -> None:
        self._drain()
        super().settle(optimizers)

    def _drain(self) -> None:
        if self._served is not None:
            self._worker().drain()
            self._listen(self._worker())

    def _worker(self) -> Worker:
        assert self._served is not None
        assert self._served.worker is not None
        return self._served.worker

    def _reduced(self) -> ServedReducer:
        assert self._gradients is not None
        return self._gradients

    @staticmethod
    def _tables_of(worker: Worker) -> list[str]:
        return [table.name for table in worker.flats.shards.tables]
