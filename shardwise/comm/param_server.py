"""`ParameterServer`: parameters that live on servers, for any module and any loop.

    named = dict(module.named_parameters())
    with ParameterServer(named, group, optimizer=make_optimizer, method="stale", bound=4) as served:
        for batch in batches:
            served.pull()                              # waits as the method says
            loss(module(batch)).backward()
            served.push(weight=len(batch))             # .grad goes to the servers, and is None again
        served.drain()                                 # all have everything

Li et al. 2014 (servers and shards), Dean et al. 2012 (asynchronous updates), Ho et al. 2013 (bounded staleness), Chen
et al. 2016 (backup workers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shardwise.comm.clocks import Rule
from shardwise.comm.collectives import broadcast_all
from shardwise.comm.group import Group
from shardwise.comm.param_flats import Flats, place_tensors
from shardwise.comm.param_lockstep import Lockstep
from shardwise.comm.param_peers import Here, Peer, There
from shardwise.comm.param_serve import Server
from shardwise.comm.param_store import Optimize, Push, Store
from shardwise.comm.param_wire import Line, Total
from shardwise.comm.param_worker import Worker
from shardwise.errors import SpecError, did_you_mean

METHODS = ("sync", "async", "stale")


class Terms(NamedTuple):
    """How workers and servers go together: the method with its numbers, and who is what (places in the group).

    `ahead`: where above 0, samples are dealt anew when workers' speeds differ, from so many clocks later on.
    """

    method: str = "sync"
    bound: int = 0
    backup: int = 0
    servers: tuple[int, ...] = ()
    workers: tuple[int, ...] = ()
    ahead: int = 0

    def settled(self, size: int) -> Terms:
        """With everybody a server and a worker where nobody is named. Raises SpecError for what cannot be."""
        servers, workers = self.servers or tuple(range(size)), self.workers or tuple(range(size))
        if self.method not in METHODS:
            raise SpecError(f"method='{self.method}'{did_you_mean(self.method, METHODS)}")
        known = set(range(size))
        if len(set(servers)) < len(servers) or len(set(workers)) < len(workers) or not {*servers, *workers} <= known:
            raise SpecError(f"servers={servers} and workers={workers} must be different places of a group of {size}.")
        if self.bound < 0 or (self.bound and self.method != "stale"):
            raise SpecError(f"bound={self.bound} with method={self.method}: it goes with stale, and is at least 0.")
        if not 0 <= self.backup < len(workers) or (self.backup and self.method != "sync"):
            raise SpecError(
                f"backup={self.backup} with method={self.method}: it goes with sync, and leaves at least one of the "
                f"{len(workers)} worker(s) whose gradient counts."
            )
        return self._replace(servers=servers, workers=workers)

    @property
    def rule(self) -> Rule:
        if self.method == "async":
            return Rule(None, at_once=True)
        return Rule(self.bound, self.backup)


class Served:
    """The parts of a parameter server on one rank: `worker`, `server` or both, or `lockstep` in place of both.

    Collective: every rank of the group makes one, with the same parameters by name; all take the first server's
    values. `named` become views of flat tensors until `close`. `tables` have sparse gradients: only rows travel.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        group: Group,
        terms: Terms,
        optimize: Optimize,
        *,
        tables: Sequence[str] = (),
        bucket_bytes: int = 25_000_000,
        cut: bool = True,
        schedule: Callable[[int], object] | None = None,
        clock: int = 0,
        flats: Flats | None = None,
    ) -> None:
        self.terms = terms = terms.settled(group.size())
        self.group = group
        self.named = dict(named)
        me = group.rank()
        everybody = tuple(range(group.size()))
        in_step = terms.method == "sync" and not terms.backup and not tables
        in_step = in_step and terms.servers == everybody == terms.workers
        if flats is None:
            broadcast_all([t.detach() for t in named.values()], group, root=terms.servers[0])
            shards = place_tensors(named, len(terms.servers), bucket_bytes, tables=tuple(tables), cut=cut)
            flats = Flats(shards, named, group.zeros)
        self.flats = flats
        self.number = terms.servers.index(me) if me in terms.servers else None
        self.server: Server | None = None
        self.worker: Worker | None = None
        self.lockstep: Lockstep | None = None
        self.store: Store | None = None
        if self.number is not None:
            own = [flats.piece(values, i, self.number) for i, values in enumerate(flats.values)]
            rows = flats.rows(self.number)
            if not in_step:
                own, rows = [piece.clone() for piece in own], [table.clone() for table in rows]
            self.store = Store(flats.shards, self.number, named, own, rows, optimize, schedule)
        if in_step:
            assert self.store is not None
            self.lockstep = Lockstep(flats, group, self.store)
            return
        if self.store is not None:
            leads = self.number == 0
            self.server = Server(group, self.store, terms.rule, terms.workers, clock, leads=leads, ahead=terms.ahead)
            self.server.open()
        if me in terms.workers:
            peers = [self._peer(rank) for rank in terms.servers]
            self.worker = Worker(flats, peers, clock, len(terms.workers), backup=bool(terms.backup))

    def _peer(self, rank: int) -> Peer:
        if rank == self.group.rank():
            assert self.server is not None
            return Here(self.server)
        return There(Line(self.group, rank), len(self.terms.workers))

    def close(self) -> None:
        """Leave: collective but for ranks whose group has failed. The parameters have memory of their own again."""
        if not self.group.aborted:
            if self.worker is not None:
                self.worker.leave()
            if self.server is not None:
                self.server.close()
        self.flats.restore()


class ParameterServer:
    """A `Served` for a loop of one's own: pull, backward, push.

    `optimizer(tensors)` makes the optimizer of the pieces that lie on this rank's server; parameters may be cut, so it
    must treat all elements alike unless `cut` is False. `group` is used by nothing else meanwhile. Ranks that are only
    servers call `serve`.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        group: Group,
        *,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        method: Literal["sync", "async", "stale"] = "sync",
        bound: int = 0,
        backup: int = 0,
        servers: Sequence[int] = (),
        workers: Sequence[int] = (),
        tables: Sequence[str] = (),
        bucket_bytes: int = 25_000_000,
        cut: bool = True,
        schedule: Callable[[int], object] | None = None,
    ) -> None:
        terms = Terms(method, bound, backup, tuple(servers), tuple(workers))
        self._served = Served(
            named,
            group,
            terms,
            lambda shard: [optimizer([part.tensor for part in shard])],
            tables=tables,
            bucket_bytes=bucket_bytes,
            cut=cut,
            schedule=schedule,
        )
        self._schedule = schedule
        self._clock = 0
        self._expected = 0.0
        self.totals: list[Total] = []

    @property
    def clock(self) -> int:
        """How many clocks this worker has finished."""
        return self._clock if self._served.worker is None else self._served.worker.clock

    def pull(self, rows: Mapping[str, Tensor] | None = None) -> bool:
        """Wait until the next clock may start, and get the parameters; False when the clock was skipped as too late.

        `rows`: of these tables only these rows are fetched. Raises CommError when a rank that is needed is lost.
        """
        return self._served.lockstep is not None or self._worker().start(rows)

    def push(self, loss_sum: float = 0.0, weight: float = 1.0, *, scale: float | None = None) -> bool:
        """Hand `.grad` of every parameter over (it is None afterwards); whether it counts (it may be too late).

        The update uses the mean over all workers, by `weight`. Gradients are those of a mean loss, unless `scale` says
        what the gradients of the loss sum were multiplied with.
        """
        scale = 1.0 / weight if scale is None and weight else scale or 1.0
        served = self._served
        used, rows = self._collect()
        if served.lockstep is not None:
            self._push_in_step(served.lockstep, loss_sum, weight, scale, used)
            return True
        worker = self._worker()
        if served.terms.backup and not worker.in_time():
            return False
        if not self._expected:
            self._expected = weight * len(served.terms.workers)
        worker.begin()
        for flat in range(len(served.flats.grads)):
            worker.send(flat)
        worker.finish(Push(loss_sum, weight, scale, self._expected, used), int(weight), rows)
        self._take_totals(worker.totals)
        worker.totals = []
        return True

    def drain(self) -> None:
        """Wait until every worker is here and all gradients are in the parameters; all ranks have the same then."""
        if self._served.lockstep is None:
            worker = self._worker()
            worker.drain()
            self._take_totals(worker.totals)
            worker.totals = []

    def serve(self) -> None:
        """On a rank that is only a server: return when all workers have closed."""
        if self._served.worker is not None or self._served.lockstep is not None:
            raise SpecError("serve is for ranks that are only servers; this one is a worker too and serves meanwhile.")
        self._served.close()

    def close(self) -> None:
        """Every worker calls it. The parameters are ordinary again, with the values of the last `pull` or `drain`."""
        self._served.close()

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._served.group.abort(f"a rank of the parameter server failed: {error}")
        self.close()

    def _worker(self) -> Worker:
        if self._served.worker is None:
            raise SpecError("this rank is only a server: call serve, and pull and push on the workers.")
        return self._served.worker

    def _collect(self) -> tuple[tuple[bool, ...], dict[str, tuple[Tensor, Tensor]]]:
        """Gradients into their flats; which there are, and the rows of tables."""
        flats = self._served.flats
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        used = []
        for name, tensor in self._served.named.items():
            grad, tensor.grad = tensor.grad, None
            used.append(grad is not None)
            if name in flats.grad_views:
                flats.grad_views[name].zero_() if grad is None else flats.grad_views[name].copy_(grad)
            elif grad is not None:
                rows[name] = table_rows(name, grad)
        return tuple(used), rows

    def _push_in_step(
        self, lockstep: Lockstep, loss_sum: float, weight: float, scale: float, used: tuple[bool, ...]
    ) -> None:
        for flat, grads in enumerate(self._served.flats.grads):
            grads.mul_(1.0 / scale)
            lockstep.send(flat)
        row = torch.tensor([loss_sum, weight, *map(float, used)], dtype=torch.float64)
        told = lockstep.settle(row)[0].tolist()
        if self._schedule is not None:
            self._schedule(self._clock)
        if told[1]:
            lockstep.update(1.0 / told[1], {number for number, count in enumerate(told[2:]) if count})
        self._take_totals([Total(self._clock, told[0], told[1])])
        self._clock += 1

    def _take_totals(self, totals: Sequence[Total]) -> None:
        self.totals += totals
        if totals and totals[-1].weight:
            self._expected = totals[-1].weight


def table_rows(name: str, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse gradient, each row once. Raises SpecError for a dense one."""
    if grad.layout != torch.sparse_coo:
        raise SpecError(
            f"'{name}' was to have sparse gradients, but one is dense: it is used by more than an embedding with "
            "sparse=True. Leave it out of the tables, or build the embedding with sparse=False."
        )
    whole = grad.coalesce()
    return whole.indices()[0], whole.values()
