"""`Hierarchical`: collectives of ranks on several hosts: through shared memory inside a host, over gloo between hosts.

```
host 0           host 1              all_reduce by columns: 1. each host sums a piece on each of its ranks
+-------------+  +-------------+                            2. the ranks of a column exchange their pieces
| rank 0 -----+--+---- rank 2  |  column 0                  3. each host gathers the pieces
| rank 1 -----+--+---- rank 3  |  column 1            by leaders: host sums on its first rank; leaders exchange
+-------------+  +-------------+                            everything; each leader tells its host
```
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.interfaces import agree
from shardwise.comm.paths import Paths, measure
from shardwise.comm.shm import Shm
from shardwise.comm.shm_connect import connect_shm
from shardwise.comm.shm_work import ShmFailure, Started, Together
from shardwise.comm.wire import COMBINE, OPERATIONS, Combine, LinkFailure, Wire
from shardwise.comm.worker import Job, Unhurried, Worker
from shardwise.errors import CommError
from shardwise.spec.collective_cost import Path, Topology, through

if TYPE_CHECKING:
    from shardwise.comm.backends import Inner, Membership

INSIDE = Path(20e-6, 10e9)  # shared memory, roughly: all forms of a collective use it alike
LEAVE_S = 1.0  # what is under way may end before the connections do
REDUCTIONS = {combine: operation for operation, combine in COMBINE.items()}
BITWISE = (OPERATIONS.BAND, OPERATIONS.BOR, OPERATIONS.BXOR)
SUMS = (OPERATIONS.SUM, OPERATIONS.AVG, OPERATIONS.PREMUL_SUM)
BETWEEN = "between hosts: "  # begins the text of a failure that this host's ranks are told and cannot know the cause of


def connect_hosts(who: Membership, places: Sequence[bytes], gloo: Callable[[Membership], Inner]) -> Hierarchical | None:
    """The backend of a group whose ranks are on the hosts `places`; None everywhere if a host has no shared memory.

    Collective; `gloo` makes a backend for one interface. Raises CommError, or what `gloo` raises.
    """
    names = list(dict.fromkeys(places))
    hosts = [tuple(r for r, place in enumerate(places) if place == name) for name in names]
    host = names.index(places[who.rank])
    local = hosts[host]
    store = dist.PrefixStore("hosts", who.store)
    inside = None
    if len(local) > 1:
        here = dist.PrefixStore(f"inside-{host}", store)
        inside = connect_shm(here, local.index(who.rank), [who.ranks[r] for r in local])
    store.set(f"shared/{who.rank}", "yes" if inside is not None or len(local) == 1 else "no")
    if not all(store.get(f"shared/{r}") == b"yes" for r in range(len(places))):
        return None
    interfaces = agree(store, host, len(hosts), who.rank == local[0], who.host) or [""]
    links = [
        gloo(who._replace(store=dist.PrefixStore(f"path-{i}", store), interface=name))
        for i, name in enumerate(interfaces)
    ]
    wires = [Wire(link.backend, who.ranks) for link in links]
    try:
        measured = measure(wires, store, tuple(each[0] for each in hosts), who.rank)
    except LinkFailure as error:
        raise CommError(f"rank {who.ranks[who.rank]} could not measure its links: {error}.") from None
    return Hierarchical(who.rank, who.ranks, hosts, inside, links, wires, measured)


class Hierarchical:
    """The operations of one group, as `torch.distributed` names them, each on a worker thread, in order.

    Messages between ranks of a host go through shared memory, others over the first link; they have no order among the
    collectives. Gather, scatter and all-to-all send every byte once anyway and are left to gloo. `form` (`columns` or
    `leader`) and `paths.only` override what the cost functions choose.
    """

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        hosts: Sequence[tuple[int, ...]],
        inside: Shm | None,
        links: Sequence[Inner],
        wires: Sequence[Wire],
        measured: Sequence[Path],
    ) -> None:
        self.rank = rank
        self.size = len(ranks)
        self.ranks = tuple(ranks)
        self.hosts = tuple(hosts)
        self.host = next(h for h, members in enumerate(hosts) if rank in members)
        self.local = self.hosts[self.host]
        self.place = self.local.index(rank)
        self.form: str | None = None
        self._even = len({len(members) for members in self.hosts}) == 1
        failed = functools.partial(_failed, weakref.ref(self))
        self.paths = Paths(wires, measured, failed)
        self._inside = inside
        self._links = list(links)
        self._gloo = links[0].backend
        self._worker = Worker("collectives between hosts", failed)
        self._at_exit = functools.partial(_leave, weakref.ref(self))
        atexit.register(self._at_exit)

    def __del__(self) -> None:
        atexit.unregister(self._at_exit)
        self._worker.stop(0)
        self.paths.stop()

    def sent(self) -> int | None:
        """Bytes that this rank sent to other hosts, over all links."""
        counts = [link.sent() for link in self._links]
        return None if None in counts else sum(filter(None, counts))

    # Failure.

    def abort(self, why: str = "the group was aborted") -> None:
        """Free everybody who waits in this group: on this host at once, elsewhere because the connections end."""
        if self._inside is not None:
            self._inside.abort(why)
        for link in self._links:
            link.abort(why)

    def leave(self) -> None:
        """End without an error, after what is under way (at most LEAVE_S). May be called again."""
        atexit.unregister(self._at_exit)
        self._worker.stop(LEAVE_S)
        self.paths.stop()
        if self._inside is not None:
            self._inside.leave()
        for link in self._links:
            link.leave()
        self._worker.join(LEAVE_S)  # a thread in the middle of a wait must not see the interpreter end

    # Reductions.

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return _each([self._reduced(self._all_reduce, t, t, opts.reduceOp) for t in tensors])

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        call = functools.partial(self._reduce, root=opts.rootRank)
        root = self.rank == opts.rootRank
        return _each([self._reduced(call, t, t if root else None, opts.reduceOp) for t in tensors])

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Started:
        works = []
        for output, pieces in zip(outputs, inputs, strict=True):
            self._one_each(pieces, "inputs of reduce_scatter")
            whole = torch.cat([piece.reshape(-1) for piece in pieces])
            works.append(self._reduce_scatter_base(output, whole, opts))
        return _each(works)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any) -> Started:
        self._fits(input, output)
        return self._reduced(self._reduce_scatter, input, output, opts.reduceOp)

    # Copies.

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        root = opts.rootRank
        return _each([self._submit(functools.partial(self._broadcast, t, root), [t]) for t in tensors])

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Started:
        works: list[Started] = []
        for pieces, mine in zip(outputs, inputs, strict=True):
            self._one_each(pieces, "outputs of all_gather")
            works.append(self._submit(functools.partial(self._gather_list, pieces, mine), [list(pieces)]))
        return _each(works)

    def allgather_coalesced(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Started:
        return self.allgather([[each[i] for each in outputs] for i in range(len(inputs))], inputs, opts)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any) -> Started:
        self._fits(output, input)
        return self._submit(functools.partial(self._all_gather, output, input), [output])

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> Started:
        return self._handed("gather", [outputs], outputs, inputs, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> Started:
        return self._handed("scatter", outputs, outputs, inputs, opts)

    def alltoall(self, outputs: Any, inputs: Any, opts: Any) -> Started:
        return self._handed("alltoall", outputs, outputs, inputs, opts)

    def alltoall_base(self, output: Tensor, input: Tensor, out_rows: Any, in_rows: Any, opts: Any) -> Started:
        return self._handed("alltoall_base", [output], output, input, out_rows, in_rows, opts)

    def barrier(self, opts: Any) -> Started:
        return self._submit(lambda: self._all_reduce(torch.zeros(1), torch.add), [])

    # Messages.

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int) -> Started:
        if self._inside is not None and dst in self.local:
            return self._inside.send(tensors, self.local.index(dst), tag)
        return Unhurried(self._gloo.send(list(tensors), dst, tag), list(tensors))

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int) -> Started:
        if self._inside is not None and src in self.local:
            return self._inside.recv(tensors, self.local.index(src), tag)
        return Unhurried(self._gloo.recv(list(tensors), src, tag), list(tensors))

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> Started:
        if self._inside is not None:
            raise CommError(
                "a group that spans hosts cannot receive from any source: messages inside a host and between hosts go "
                "different ways. Name the source, or set SHARDWISE_TRANSPORT=gloo."
            )
        return Unhurried(self._gloo.recv_anysource(list(tensors), tag), list(tensors))

    # What is given to the worker thread.

    def _submit(self, call: Callable[[], None], results: list[Any]) -> Job:
        def run() -> None:
            try:
                call()
            except ShmFailure as error:
                if BETWEEN in str(error):  # a rank of this host tells what it saw elsewhere: the cause is not here
                    raise RuntimeError(str(error)) from None
                raise

        return self._worker.submit(run, results)

    def _handed(self, name: str, results: list[Any], *arguments: Any) -> Job:
        return self._submit(lambda: getattr(self._gloo, name)(*arguments).wait(), results)

    def _reduced(
        self, call: Callable[[Tensor, Combine], None], given: Tensor, target: Tensor | None, reduction: Any
    ) -> Job:
        """`call` sums a flat tensor in place: `given` itself where that is also the target, else a copy of it.

        `target` takes as many of the first elements as it has; None: this rank gets no result.
        """
        combine = _combine(reduction, given)

        def run() -> None:
            numbers = _real(given.detach())
            flat = numbers.contiguous().view(-1)
            if target is not given and flat.data_ptr() == numbers.data_ptr():
                flat = flat.clone()
            if reduction.op == OPERATIONS.PREMUL_SUM:
                flat.mul_(reduction.__getstate__()[1])
            call(flat, combine)
            if target is None:
                return
            wanted = _real(target.detach())
            found = flat[: wanted.numel()]
            if reduction.op == OPERATIONS.AVG:
                found.div_(self.size, rounding_mode=None if found.is_floating_point() else "trunc")
            if found.data_ptr() != wanted.data_ptr() or not wanted.is_contiguous():
                wanted.copy_(found.view(wanted.shape))

        return self._submit(run, [] if target is None else [target])

    def _fits(self, whole: Tensor, piece: Tensor) -> None:
        if whole.dtype != piece.dtype or whole.numel() != piece.numel() * self.size:
            raise ValueError(
                f"a tensor of {whole.numel()} elements of {whole.dtype} cannot be {self.size} pieces of "
                f"{piece.numel()} elements of {piece.dtype}."
            )

    def _one_each(self, pieces: Sequence[Tensor], what: str) -> None:
        if len(pieces) != self.size:
            raise ValueError(f"{what}: {len(pieces)} tensors were given for {self.size} ranks.")

    # Inside: each of these runs on the worker thread and leaves its result in the tensors that it was given.

    def _all_reduce(self, flat: Tensor, combine: Combine) -> None:
        columns = self._form(flat.nbytes) == "columns" and self._inside is not None
        if columns and flat.numel() >= len(self.local):
            self._by_columns(flat, combine)
            return
        self._sum_inside(flat, combine, root=0)
        if self.place == 0:
            leaders = tuple(members[0] for members in self.hosts)
            self.paths.run("all_reduce", flat, leaders, self.host, combine=combine)
        self._tell_inside(flat, root=0)

    def _by_columns(self, flat: Tensor, combine: Combine) -> None:
        """Piece r of a host's tensor is on its rank r; the last one also has what is left over."""
        inside, ranks = self._inside, len(self.local)
        assert inside is not None
        each = flat.numel() // ranks
        starts = [each * r for r in range(ranks)] + [flat.numel()]
        pieces = [flat[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        mine = torch.empty_like(pieces[self.place])
        self._scatter_inside(mine[:each], flat[: each * ranks], combine)
        if each * ranks < flat.numel():
            rest = flat[each * ranks :]
            self._sum_inside(rest, combine, root=ranks - 1)
            if self.place == ranks - 1:
                mine[each:] = rest
        column = tuple(members[self.place] for members in self.hosts)
        self.paths.run("all_reduce", mine, column, self.host, combine=combine, sharing=ranks)
        inside.allgather([pieces], [mine]).wait()

    def _reduce(self, flat: Tensor, combine: Combine, root: int) -> None:
        agents = self._agents(root)
        at = self.local.index(agents[self.host])
        self._sum_inside(flat, combine, root=at)
        if self.place == at:
            self.paths.run("reduce", flat, agents, self.host, combine=combine, root=self._host_of(root))

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        flat = tensor.detach().contiguous()
        line = _numbers(flat)
        agents = self._agents(root)
        at = self.local.index(agents[self.host])
        if self.place == at:
            self.paths.run("broadcast", line, agents, self.host, root=self._host_of(root))
        self._tell_inside(line, root=at)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat)

    def _all_gather(self, output: Tensor, mine: Tensor) -> None:
        if not mine.numel():
            return
        line = output if output.is_contiguous() else torch.empty(output.shape, dtype=output.dtype)
        table = _numbers(line).view(self.size, -1)
        row = _numbers(mine.detach().contiguous())
        if not self._even:
            table[self.rank] = row
            self.paths.run("all_gather", table.view(-1), tuple(range(self.size)), self.rank)
        else:
            column = table.new_empty(len(self.hosts), row.numel())
            column[self.host] = row
            members = tuple(each[self.place] for each in self.hosts)
            self.paths.run("all_gather", column.view(-1), members, self.host, sharing=len(self.local))
            self._spread(table, column)
        if line is not output:
            output.copy_(line)

    def _spread(self, table: Tensor, column: Tensor) -> None:
        """Rows of all hosts from this rank's column, and from those of the host's other ranks."""
        columns = [column]
        if self._inside is not None:
            columns = [torch.empty_like(column) for _ in self.local]
            self._inside.allgather([columns], [column]).wait()
        for place, rows in enumerate(columns):
            table[[members[place] for members in self.hosts]] = rows

    def _gather_list(self, pieces: Sequence[Tensor], mine: Tensor) -> None:
        if all(piece.numel() == mine.numel() for piece in pieces):
            table = mine.new_empty(self.size, mine.numel())
            self._all_gather(table, mine)
            for piece, row in zip(pieces, table, strict=True):
                piece.copy_(row.view_as(piece))
            return
        for rank, piece in enumerate(pieces):  # unlike sizes: one after the other
            if rank == self.rank:
                piece.copy_(mine.view_as(piece))
            self._broadcast(piece, rank)

    def _reduce_scatter(self, flat: Tensor, combine: Combine) -> None:
        """The sum of this rank's piece, in the place of the first."""
        if not flat.numel():
            return
        table = flat.view(self.size, -1)
        if not self._even:
            self.paths.run("reduce_scatter", flat, tuple(range(self.size)), self.rank, combine=combine)
            flat[: table.shape[1]] = table[self.rank].clone()
            return
        order = [members[place] for place in range(len(self.local)) for members in self.hosts]
        mine = table.new_empty(len(self.hosts), table.shape[1])
        if self._inside is None:
            mine.copy_(table[order])
        else:
            self._scatter_inside(mine.view(-1), table[order].view(-1), combine)
        column = tuple(members[self.place] for members in self.hosts)
        self.paths.run("reduce_scatter", mine.view(-1), column, self.host, combine=combine, sharing=len(self.local))
        flat[: table.shape[1]] = mine[self.host]

    def _scatter_inside(self, piece: Tensor, whole: Tensor, combine: Combine) -> None:
        assert self._inside is not None
        options = dist.ReduceScatterOptions()
        options.reduceOp = REDUCTIONS[combine]
        self._inside._reduce_scatter_base(piece, whole, options).wait()

    def _sum_inside(self, flat: Tensor, combine: Combine, root: int) -> None:
        if self._inside is not None:
            options = dist.ReduceOptions()
            options.reduceOp, options.rootRank = REDUCTIONS[combine], root
            self._inside.reduce([flat], options).wait()

    def _tell_inside(self, flat: Tensor, root: int) -> None:
        if self._inside is not None:
            options = dist.BroadcastOptions()
            options.rootRank = root
            self._inside.broadcast([flat], options).wait()

    def _form(self, nbytes: int) -> str:
        if self.form is not None:
            return self.form
        topology = Topology(tuple(len(members) for members in self.hosts), INSIDE, self.paths.paths)
        return through("all_reduce", nbytes, topology, only=self.paths.only).form

    def _agents(self, root: int) -> tuple[int, ...]:
        """The rank of each host that speaks for it: the root for its own, else the first."""
        return tuple(root if root in members else members[0] for members in self.hosts)

    def _host_of(self, rank: int) -> int:
        return next(h for h, members in enumerate(self.hosts) if rank in members)


def _combine(reduction: Any, tensor: Tensor) -> Combine:
    """Raises ValueError for a reduction that this type does not have."""
    operation = OPERATIONS.SUM if reduction.op in SUMS else reduction.op
    if operation not in COMBINE:
        raise ValueError(f"{reduction.op.name} is not known here.")
    if operation in BITWISE and tensor.is_floating_point():
        raise ValueError(f"{reduction.op.name} of {tensor.dtype} is not defined: it takes integers.")
    if tensor.is_complex() and operation != OPERATIONS.SUM:
        raise ValueError(f"{reduction.op.name} of complex numbers is not defined.")
    return COMBINE[operation]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _numbers(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes: what is only moved."""
    return tensor.view(-1).view(torch.uint8)


def _each(works: list[Started]) -> Started:
    return works[0] if len(works) == 1 else Together(works)


def _failed(backend: weakref.ref[Hierarchical], error: Exception) -> None:
    """The first failure on any thread of a backend ends the group everywhere."""
    alive = backend()
    if alive is not None:
        saw = f"{BETWEEN}rank {alive.ranks[alive.rank]} saw that {error}"
        alive.abort(str(error) if isinstance(error, ShmFailure) else saw)


def _leave(backend: weakref.ref[Hierarchical]) -> None:
    alive = backend()
    if alive is not None:
        alive.leave()
