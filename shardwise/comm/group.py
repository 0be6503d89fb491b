"""`Group`: one process group for every axis and backend, with one order, tags, byte counts and a real abort."""

# mypy: disable-error-code="override"
# torch's stubs overload each operation for callers that do not exist here; these take the union of what torch passes.

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed.distributed_c10d as dist
from torch._C._distributed_c10d import AllgatherOptions
from torch._C._distributed_c10d import Backend as NativeBackend

from shardwise.comm.backends import BACKENDS, Inner, Membership, shm
from shardwise.comm.direct import Direct
from shardwise.comm.kernel import Kind
from shardwise.comm.shm import Shm
from shardwise.comm.shm_work import ShmFailure
from shardwise.comm.store import LOOPBACK, first_line
from shardwise.comm.waits import Waits
from shardwise.comm.work import GuardedWork, Tag, profiling, section
from shardwise.comm.worker import Unhurried
from shardwise.errors import CommError

NAME, SHM = "shardwise", "shm"
REMEMBERED = 64
UNHURRIED = (
    "send",
    "recv",
    "reduce_scatter",
)  # of gloo: a wait for these must not run out, or does not say how it ended
UNSEEN = ("shm", "shm-torch")  # by torch's profiler, which knows its own backends
REPORT_S = 0.5  # how long a failed rank waits for the others to report, to say who did not


class GroupSettings(NamedTuple):
    """How `torch.distributed` is to make a Group: passed as `pg_options`. `host` None leaves the interface to gloo.

    `backend` is the name that the group goes by; as "shm" it shares memory or fails.
    """

    devices: tuple[str, ...] = ("cpu",)
    host: str | None = LOOPBACK
    threads: int = 1
    timeout_s: float = 0.0
    generation: int = 0
    backend: str = NAME


class Group(dist.ProcessGroup):
    """A `torch.distributed.ProcessGroup` of ranks that share an axis; DTensor, FSDP2, DDP and pipelining run on it.

    Operations of all threads pass one lock and get one sequence number, so every rank issues them in one order.
    `step` is set by the caller and only tags errors. `wire` counts, for each operation, messages and the bytes handed
    to the backend on this rank; `waits` how long callers waited. After a failure or `abort` every call raises
    CommError: a new Group is needed.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        inners: dict[str, Inner],
        *,
        name: str = "data",
        ranks: Sequence[int] = (),
        timeout_s: float = 600.0,
        settings: GroupSettings = GroupSettings(),
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # only this form lets Python override operations
        self._store = store
        self._inners = inners
        self._lock = threading.Lock()
        self._recent: collections.deque[tuple[int, str]] = collections.deque(maxlen=REMEMBERED)
        self._why_aborted: str | None = None
        self._name = name
        self._desc = name
        self._sequence = 0
        self.ranks = tuple(ranks) or tuple(range(size))
        self.timeout_s = timeout_s
        self.settings = settings
        self.step = 0
        self.wire: dict[str, tuple[int, int]] = {}
        self.waits = Waits()
        memory = inners["cpu"].backend if "cpu" in inners else None
        self._direct = Direct(self, memory) if type(memory) is Shm else None
        kinds = {"cpu": dist.ProcessGroup.BackendType.GLOO, "cuda": dist.ProcessGroup.BackendType.NCCL}
        for device, inner in inners.items():
            if isinstance(inner.backend, NativeBackend):  # what is not overridden below falls through to it
                self._register_backend(torch.device(device), kinds[device], inner.backend)

    # Identity, as torch.distributed asks for it.

    def getBackendName(self) -> str:
        return self.settings.backend

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    @property
    def transport(self) -> str:
        """What moves tensors of this mesh's device: `shm`, `shm-torch`, `gloo`, `nccl`."""
        return self._inners[self.settings.devices[-1]].name

    def sent(self) -> int | None:
        """Bytes that left this host's memory for other ranks, where every backend counts them."""
        counts = [inner.sent() for inner in self._inners.values()]
        return None if None in counts else sum(filter(None, counts))

    def _set_sequence_number_for_group(self) -> None:
        return None

    # Failure.

    @property
    def aborted(self) -> bool:
        return self._why_aborted is not None

    @property
    def why_aborted(self) -> str:
        """Why no operation can be started any more; empty while it can."""
        return self._why_aborted or ""

    def abort(self, why: str = "it was aborted on this rank") -> None:
        """Free every caller that waits in this group, on this rank and (their connections end) on the others.

        May be called from any thread, any number of times. The group cannot be used again.
        """
        if self._why_aborted is None:
            self._why_aborted = why
            threading.Thread(target=_quietly, args=(self._report, why), daemon=True).start()
        for inner in self._inners.values():
            inner.abort(f"rank {self.ranks[self.rank()]} aborted it: {why}")

    def shutdown(self) -> None:
        """End the group without an error: later calls raise."""
        self._why_aborted = self._why_aborted or "it was closed"
        for inner in self._inners.values():
            inner.leave()

    def aborted_error(self, tag: Tag) -> CommError:
        """What a caller of `tag` is told after an abort."""
        return CommError(
            f"{self._describe(tag)} did not finish: the group is closed because {self._why_aborted}. "
            "An aborted group is never used again; connect the ranks anew."
        )

    def failed(self, tag: Tag, error: BaseException) -> CommError:
        """Abort after a failure of the backend, and say which ranks did not report."""
        why = str(error) if isinstance(error, ShmFailure) else first_line(error).rstrip(".")
        self.abort(f"{tag.op} number {tag.sequence}{self._whom(tag)} failed: {why}")
        if isinstance(error, ShmFailure):  # it names the rank, and came at once
            return CommError(f"{self._describe(tag)} failed: {error}. An aborted group is never used again.")
        return CommError(f"{self._describe(tag)} failed: {first_line(error)} {self._blame()}")

    def timed_out(self, tag: Tag, limit_s: float) -> CommError:
        """Abort after `limit_s` seconds of waiting, and say which ranks did not report."""
        self.abort(f"{tag.op} number {tag.sequence} took longer than {limit_s:g} s")
        return CommError(f"{self._describe(tag)} waited longer than its timeout of {limit_s:g} s. {self._blame()}")

    def _describe(self, tag: Tag) -> str:
        return (
            f"{tag.op} number {tag.sequence}{self._whom(tag)} of group '{self._desc}' "
            f"(generation {tag.generation}, step {tag.step}) on rank {self.ranks[self.rank()]}"
        )

    def _whom(self, tag: Tag) -> str:
        return "" if tag.peer is None else f" {'to' if tag.op == 'send' else 'from'} rank {self.ranks[tag.peer]}"

    def _report(self, why: str) -> None:
        self._store.set(f"failed/{self.rank()}", why)

    def _blame(self) -> str:
        reasons = self._reasons()
        silent = [self.ranks[r] for r in range(self.size()) if r != self.rank() and r not in reasons]
        if not reasons:
            who = f"No other rank reported; this one waited for rank(s) {', '.join(map(str, silent))}."
        elif silent:
            who = f"Rank(s) {', '.join(map(str, silent))} did not report: this rank waited for them."
        else:
            told = "; ".join(f"rank {self.ranks[r]}: {why}" for r, why in sorted(reasons.items()))
            who = f"Every other rank still answers ({told})."
        last = ", ".join(f"{sequence} {op}" for sequence, op in list(self._recent)[-5:])
        return f"{who} The last operations here were: {last}. Look at the end of the other ranks' logs for the cause."

    def _reasons(self) -> dict[int, str]:
        """Why the other ranks left this group, of those that say so within REPORT_S."""
        found: dict[int, str] = {}

        def ask() -> None:
            end = time.monotonic() + REPORT_S
            others = [r for r in range(self.size()) if r != self.rank()]
            while len(found) < len(others) and time.monotonic() < end:
                for rank in others:
                    if rank not in found and self._store.check([f"failed/{rank}"]):
                        found[rank] = self._store.get(f"failed/{rank}").decode()
                time.sleep(0.02)

        asking = threading.Thread(target=_quietly, args=(ask,), daemon=True)
        asking.start()
        asking.join(2 * REPORT_S)
        return dict(found)

    # Operations.

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D tensor of zeros; in shared memory where the ranks have some: they reduce that without a copy."""
        inner = self._inners.get(device.type)
        if inner is not None and isinstance(inner.backend, Shm):
            shared = inner.backend.heap.allocate(numel, dtype)
            if shared is not None:
                return shared
        return torch.zeros(numel, dtype=dtype, device=device)

    def _enter(self, op: str, nbytes: int, peer: int | None = None) -> int:
        """The number of an operation that begins now; the caller holds the lock. Raises CommError after an abort."""
        self._sequence += 1
        if self._why_aborted is not None:
            raise self.aborted_error(self._tag(op, self._sequence, peer))
        self._recent.append((self._sequence, op))
        if self.waits.timeline is not None:
            self.waits.timeline.began(self, op, self._sequence, peer)
        messages, moved = self.wire.get(op, (0, 0))
        self.wire[op] = (messages + 1, moved + nbytes)
        return self._sequence

    def _tag(self, op: str, sequence: int, peer: int | None = None) -> Tag:
        return Tag(self.settings.generation, self.step, sequence, op, peer)

    def _run(self, op: str, tensors: Any, call: Callable[[Any], Any], peer: int | None = None) -> GuardedWork:
        """Issue one operation: `call(backend)` returns the backend's work. `tensors` are what it sends or receives,
        `peer` is whom a message goes to or comes from."""
        flat = _flat(tensors)
        device = flat[0].device.type if flat else next(iter(self._inners))
        inner = self._inners.get(device)
        if inner is not None and inner.name in UNSEEN and profiling():
            with section(inner.name, op):
                return self._issue(op, tensors, flat, device, call, peer)
        return self._issue(op, tensors, flat, device, call, peer)

    def _issue(
        self, op: str, tensors: Any, flat: list[torch.Tensor], device: str, call: Callable[[Any], Any], peer: int | None
    ) -> GuardedWork:
        with self._lock:
            sequence = self._enter(op, sum(t.nbytes for t in flat), peer)
            inner = self._inner_for(device)
            tag = self._tag(op, sequence, peer)
            try:
                work = call(inner)
                if op in UNHURRIED and self._inners[device].name == "gloo":
                    work = Unhurried(work, flat)
                return GuardedWork(self, tag, work, tensors, on_stream=device != "cpu")
            except RuntimeError as error:
                failure = error
        raise self.failed(tag, failure) from None

    def _inner_for(self, device: str) -> Any:
        if device not in self._inners:
            raise CommError(
                f"the group '{self._desc}' has no backend for {device} tensors, only for "
                f"{', '.join(self._inners)}. Move the tensor, or connect with device='{device}'."
            )
        return self._inners[device].backend

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> dist.Work:
        """Start the in-place sum (or `op`) of `tensor` over the ranks; wait on what is returned."""
        return self.allreduce([tensor], op)

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        opts = _options(dist.AllreduceOptions, opts, timeout)
        short = self._direct and self._direct.in_place("all_reduce", Kind.ALL_REDUCE, tensors, opts, opts.reduceOp)
        return short or self._run("all_reduce", tensors, lambda inner: inner.allreduce(_list(tensors), opts))

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceCoalescedOptions()
        return self._run("all_reduce_coalesced", tensors, lambda inner: inner.allreduce_coalesced(tensors, opts))

    def broadcast(
        self, tensors: Any, opts: Any = None, timeout: timedelta | None = None, *, root: int | None = None
    ) -> dist.Work:
        if root is not None or isinstance(opts, int):
            source = root if root is not None else opts
            opts = dist.BroadcastOptions()
            opts.rootRank = source
        opts = _options(dist.BroadcastOptions, opts, timeout)
        short = self._direct and self._direct.in_place("broadcast", Kind.BROADCAST, tensors, opts, None, opts.rootRank)
        return short or self._run("broadcast", tensors, lambda inner: inner.broadcast(_list(tensors), opts))

    def reduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceOptions()
        short = self._direct and self._direct.in_place(
            "reduce", Kind.REDUCE, tensors, opts, opts.reduceOp, opts.rootRank
        )
        return short or self._run("reduce", tensors, lambda inner: inner.reduce(_list(tensors), opts))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        opts = _options(AllgatherOptions, opts, timeout)
        short = self._pieces("all_gather", Kind.ALL_GATHER, outputs, inputs, opts, outputs)
        return short or self._run("all_gather", inputs, lambda inner: inner.allgather(outputs, inputs, opts))

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        opts = _options(AllgatherOptions, opts, None)
        short = self._pieces("all_gather", Kind.ALL_GATHER, [output], [input], opts, [output])
        return short or self._run("all_gather", [input], lambda inner: inner._allgather_base(output, input, opts))

    _allgather_base = all_gather_single

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        opts = _options(AllgatherOptions, opts, None)
        return self._run("all_gather", inputs, lambda inner: inner.allgather_coalesced(outputs, inputs, opts))

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        works = [self.all_gather_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._together(works, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.GatherOptions()
        short = self._pieces("gather", Kind.GATHER, outputs or [[]], _list(inputs), opts, outputs, root=opts.rootRank)
        return short or self._run("gather", inputs, lambda inner: inner.gather(outputs, _list(inputs), opts))

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.ScatterOptions()
        short = self._pieces("scatter", Kind.SCATTER, inputs or [[]], _list(outputs), opts, outputs, root=opts.rootRank)
        return short or self._run("scatter", outputs, lambda inner: inner.scatter(_list(outputs), inputs, opts))

    def reduce_scatter(
        self, outputs: Any, inputs: Any, opts: Any = None, timeout: timedelta | None = None
    ) -> dist.Work:
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        opts = _options(dist.ReduceScatterOptions, opts, timeout)
        short = self._pieces("reduce_scatter", Kind.REDUCE_SCATTER, inputs, outputs, opts, outputs, opts.reduceOp)
        return short or self._run("reduce_scatter", inputs, lambda inner: inner.reduce_scatter(outputs, inputs, opts))

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        opts = _options(dist.ReduceScatterOptions, opts, None)
        short = self._pieces("reduce_scatter", Kind.REDUCE_SCATTER, [input], [output], opts, [output], opts.reduceOp)
        return short or self._run(
            "reduce_scatter", [input], lambda inner: inner._reduce_scatter_base(output, input, opts)
        )

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        works = [self.reduce_scatter_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._together(works, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> dist.Work:
        opts = opts or dist.AllToAllOptions()
        outs, ins = list(output_split_sizes), list(input_split_sizes)
        short = self._direct and not outs and not ins and self._direct.exchange(output, input, opts)
        return short or self._run(
            "all_to_all", [input], lambda inner: inner.alltoall_base(output, input, outs, ins, opts)
        )

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.AllToAllOptions()
        short = self._direct and self._direct.exchange(outputs, inputs, opts)
        return short or self._run("all_to_all", inputs, lambda inner: inner.alltoall(outputs, inputs, opts))

    def _pieces(
        self,
        op: str,
        kind: Kind,
        wholes: Any,
        pieces: Any,
        opts: Any,
        results: Any,
        reduction: Any = None,
        root: int | None = None,
    ) -> dist.Work | None:
        """The short way of what has one whole and one piece."""
        if self._direct is None or len(pieces) != 1 or len(wholes) != 1:
            return None
        return self._direct.pieces(
            op, kind, wholes[0], pieces[0], opts, results=results, reduction=reduction, root=root
        )

    def send(self, tensors: Any, dst: int, tag: int = 0) -> dist.Work:
        return self._run("send", tensors, lambda inner: inner.send(tensors, dst, tag), dst)

    def recv(self, tensors: Any, src: int, tag: int = 0) -> dist.Work:
        return self._run("recv", tensors, lambda inner: inner.recv(tensors, src, tag), src)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        return self._run("recv", tensors, lambda inner: inner.recv_anysource(tensors, tag))

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        opts = _options(dist.BarrierOptions, opts, timeout)
        short = self._direct and self._direct.barrier(opts)
        return short or self._run("barrier", [], lambda inner: inner.barrier(opts))

    def _together(self, works: list[dist.Work], tensors: Any) -> dist.Work:
        """One work for several: gloo has no coalesced form of these, and the last one ends last only by luck."""
        for work in works[:-1]:
            work.wait()
        return works[-1]


def create(options: Any, settings: Any) -> Group:
    """What `torch.distributed` calls to make a group of backend "shardwise"; `settings`: `GroupSettings` or None."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if settings is None:
        settings = world.settings if isinstance(world, Group) else GroupSettings()
    timeout_s = settings.timeout_s or options.timeout.total_seconds()
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    inners = {
        device: (shm if settings.backend == SHM else BACKENDS[device])(
            Membership(
                dist.PrefixStore(device, options.store),
                options.group_rank,
                ranks,
                timeout_s,
                settings.host,
                settings.threads,
            )
        )
        for device in settings.devices
    }
    return Group(
        options.store,
        options.group_rank,
        options.group_size,
        inners,
        name=options.group_id,
        ranks=ranks,
        timeout_s=timeout_s,
        settings=settings,
    )


def create_shm(options: Any, settings: Any) -> Group:
    """The same for backend "shm": host memory only, shared or an error."""
    given = settings if isinstance(settings, GroupSettings) else GroupSettings()
    return create(options, given._replace(backend=SHM, devices=("cpu",)))


def register() -> None:
    """Make "shardwise" and "shm" backend names that `init_process_group` and `new_group` know. May be called again."""
    for name, function, devices in ((NAME, create, ["cpu", "cuda"]), (SHM, create_shm, ["cpu"])):
        if name.upper() not in dist.Backend._plugins:
            dist.Backend.register_backend(name, function, extended_api=True, devices=devices)


def _quietly(call: Callable[..., None], *args: Any) -> None:
    """Run on a thread of its own: what fails there only means that there is no answer."""
    with contextlib.suppress(RuntimeError):
        call(*args)


def _flat(tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for entry in tensors for tensor in _flat(entry)]


def _list(tensors: Any) -> Any:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors


def _options(kind: type[Any], given: Any, timeout: timedelta | None) -> Any:
    """The options object of an operation, from that object, from a reduce operation, or from nothing."""
    if isinstance(given, kind):
        return given
    options = kind()
    if given is not None:
        options.reduceOp = given
    if timeout is not None:
        options.timeout = timeout
    return options
