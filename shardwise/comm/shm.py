"""`Shm`: collectives and messages between ranks of one host, through memory that they share."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.heap import Heap
from shardwise.comm.kernel import Kind, Outcome, kernel, library
from shardwise.comm.shm_work import Completer, ShmFailure, ShmWork, Started, Together
from shardwise.errors import CommError

CHUNK = 256 << 10  # bytes that a rank writes before the others read: two of them stay in a core's own cache
PIPE = 64 << 10  # bytes that a message may run ahead of its receiver
HEAP = 64 << 30  # addresses, not memory: a rank's part of the segment takes what is allocated in it

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.bool: 9,
}
AS_BYTES = DTYPES[torch.uint8]
OPERATIONS: Any = dist.ReduceOp.RedOpType
REDUCTIONS = {
    OPERATIONS.SUM: 0,
    OPERATIONS.AVG: 1,
    OPERATIONS.PRODUCT: 2,
    OPERATIONS.MIN: 3,
    OPERATIONS.MAX: 4,
    OPERATIONS.BAND: 5,
    OPERATIONS.BOR: 6,
    OPERATIONS.BXOR: 7,
}
BITWISE = {OPERATIONS.BAND, OPERATIONS.BOR, OPERATIONS.BXOR}


class Shm:
    """The operations of one group, as `torch.distributed` names them; each returns work that can be waited for.

    Made by `connect_shm`. Collectives run in the order in which they were started, messages beside them. A failure (a
    rank that died, ranks that call different operations, `abort`) ends the group on all ranks.
    """

    def __init__(self, segment: mmap.mmap, rank: int, ranks: Sequence[int], files: Sequence[int], heap: int) -> None:
        size = len(ranks)
        self.rank = rank
        self.size = size
        self.ranks = tuple(ranks)
        self._segment = segment
        self._files = list(
            files
        )  # /proc/PID/stat of each rank, and the segment, which the others open through this one
        self._kernel = kernel()
        self._base = (ctypes.c_char * 1).from_buffer(segment)
        crowded = size > len(os.sched_getaffinity(0))
        names, watched = (ctypes.c_int * size)(*ranks), (ctypes.c_int * size)(*files[:size])
        self.context = self._kernel.shm_open_group(
            ctypes.addressof(self._base), rank, size, CHUNK, PIPE, heap, crowded, names, watched
        )
        self._leave = weakref.finalize(self, self._kernel.shm_leave, self.context)  # also when the process ends
        self.heap = Heap(segment, self._kernel.shm_fixed(size, CHUNK, PIPE) + rank * heap, heap)
        self._orphans: list[tuple[int, Any]] = []
        self._completer: Completer | None = None

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self._leave()
            self._kernel.shm_free(self.context)
        for descriptor in getattr(self, "_files", ()):
            if descriptor >= 0:
                os.close(descriptor)

    # Failure.

    def abort(self, why: str = "the group was aborted") -> None:
        """All ranks that wait in this group, or call it from now on, get ShmFailure with this text."""
        self._kernel.shm_abort(self.context, why.encode())

    def why(self) -> str:
        """Why the group ended; empty while it lives."""
        text = ctypes.create_string_buffer(1024)
        self._kernel.shm_why(self.context, text, len(text))
        return text.value.decode(errors="replace")

    def late(self) -> list[int]:
        """The ranks that have not arrived where this one waits."""
        found = (ctypes.c_int * self.size)()
        return list(found[: self._kernel.shm_late(self.context, found)])

    def leave(self) -> None:
        """Start nothing any more. Others fail when they wait for what this rank has not sent."""
        if self._completer is not None:
            self._completer.stop()
        self._leave()

    # Reductions.

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self._each([self._reduced(Kind.ALL_REDUCE, t, [t], [t], opts.reduceOp) for t in tensors])

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        root = opts.rootRank
        return self._each([self._reduced(Kind.REDUCE, t, [t], [t], opts.reduceOp, root=root) for t in tensors])

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Started:
        works = [
            self._reduced(Kind.REDUCE_SCATTER, o, i, [o], opts.reduceOp) for o, i in zip(outputs, inputs, strict=True)
        ]
        return self._each(works)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any) -> Started:
        return self._reduced(Kind.REDUCE_SCATTER, output, self._cut(input, output), [output], opts.reduceOp)

    # Copies.

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self._each([self._moved(Kind.BROADCAST, t, [t], [t], root=opts.rootRank) for t in tensors])

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Started:
        works = [self._moved(Kind.ALL_GATHER, i, [i], o) for o, i in zip(outputs, inputs, strict=True)]
        return self._each(works)

    def allgather_coalesced(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Started:
        by_input = [[each[i] for each in outputs] for i in range(len(inputs))]
        return self.allgather(by_input, inputs, opts)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any) -> Started:
        return self._moved(Kind.ALL_GATHER, input, [input], self._cut(output, input))

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Started:
        mine = outputs[0] if self.rank == opts.rootRank else []
        return self._moved(Kind.GATHER, inputs[0], inputs[:1], mine, root=opts.rootRank)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Started:
        mine = inputs[0] if self.rank == opts.rootRank else []
        return self._moved(Kind.SCATTER, outputs[0], mine, outputs[:1], root=opts.rootRank)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> Started:
        return self._moved(Kind.ALL_TO_ALL, inputs[0], inputs, outputs, alike=False)

    def alltoall_base(
        self, output: Tensor, input: Tensor, out_rows: Sequence[int], in_rows: Sequence[int], opts: Any
    ) -> Started:
        return self.alltoall(self._rows(output, out_rows), self._rows(input, in_rows), opts)

    def barrier(self, opts: Any) -> Started:
        handle = self._kernel.shm_start(self.context, Kind.BARRIER, 0, 0, 0, 0, 0, None, None, 0, None, None)
        return self._work(handle, ())

    # Messages.

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int) -> Started:
        return self._message(Kind.SEND, tensors[0], dst, tag)

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int) -> Started:
        return self._message(Kind.RECV, tensors[0], src, tag)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> Started:
        return self._message(Kind.RECV, tensors[0], -1, tag)

    # Inside.

    def _reduced(
        self,
        kind: Kind,
        like: Tensor,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        reduction: Any,
        *,
        root: int = 0,
    ) -> Started:
        if like.is_complex():
            if reduction.op not in (OPERATIONS.SUM, OPERATIONS.AVG, OPERATIONS.PREMUL_SUM):
                raise ValueError(f"{reduction.op.name} of complex numbers is not defined.")
            like, inputs, outputs = torch.view_as_real(like), _real(inputs), _real(outputs)
        code = DTYPES.get(like.dtype)
        if code is None:
            raise TypeError(f"tensors of {like.dtype} cannot be reduced, only moved.")
        if reduction.op in BITWISE and like.is_floating_point():
            raise ValueError(f"{reduction.op.name} of {like.dtype} is not defined: it takes integers.")
        number = REDUCTIONS.get(reduction.op)
        if number is None:
            inputs = [torch.mul(each, reduction.factor).to(each.dtype) for each in inputs]
            number = 0
        return self._start(kind, code, number, root, like.nbytes, inputs, outputs)

    def _moved(
        self,
        kind: Kind,
        like: Tensor,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        root: int = 0,
        alike: bool = True,
    ) -> Started:
        return self._start(
            kind, DTYPES.get(like.dtype, AS_BYTES), 0, root, like.nbytes if alike else 0, inputs, outputs
        )

    def _start(
        self,
        kind: Kind,
        dtype: int,
        reduction: int,
        root: int,
        nbytes: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> Started:
        landed = [each if each.is_contiguous() else each.contiguous() for each in outputs]
        given = [each if each.is_contiguous() else each.contiguous() for each in inputs]
        if kind is Kind.ALL_REDUCE and landed[0] is not outputs[0]:
            given = landed  # a reduction in place, of a copy
        handle = self._kernel.shm_start(
            self.context,
            kind,
            dtype,
            reduction,
            root,
            nbytes,
            len(given),
            _pointers(given),
            _sizes(given),
            len(landed),
            _pointers(landed),
            _sizes(landed),
        )
        back = [(o, c) for o, c in zip(outputs, landed, strict=True) if o is not c]
        return self._work(handle, (given, landed, outputs), back)

    def _message(self, kind: Kind, tensor: Tensor, peer: int, tag: int) -> Started:
        landed = tensor.contiguous()
        handle = self._kernel.shm_message(self.context, kind, peer, tag, landed.data_ptr(), landed.nbytes)
        back = [(tensor, landed)] if kind is Kind.RECV and landed is not tensor else []
        return self._work(handle, landed, back)

    def _work(self, handle: int | None, tensors: Any, back: Sequence[tuple[Tensor, Tensor]] = ()) -> ShmWork:
        if handle is None:
            raise ShmFailure(self.why())
        if self._orphans:
            self._sweep()
        return ShmWork(self, handle, tensors, back)

    def _each(self, works: list[Started]) -> Started:
        return works[0] if len(works) == 1 else Together(works, self)

    def adopt(self, handle: int, tensors: Any) -> None:
        """Nobody holds the work of an operation under way: its tensors must live until it has ended."""
        self._orphans.append((handle, tensors))

    def _sweep(self) -> None:
        left = []
        for handle, tensors in self._orphans:
            if self._kernel.shm_test(self.context, handle) == Outcome.AGAIN:
                left.append((handle, tensors))
            else:
                self._kernel.shm_release(self.context, handle)
        self._orphans = left

    def wait(self, handle: int, slice_s: float) -> int:
        """OK once the operation has ended, AGAIN after `slice_s` seconds, FAILED when the group has."""
        found: int = self._kernel.shm_wait(self.context, handle, slice_s)
        return found

    def test(self, handle: int) -> int:
        found: int = self._kernel.shm_test(self.context, handle)
        return found

    def release(self, handle: int) -> None:
        self._kernel.shm_release(self.context, handle)

    def source(self, handle: int) -> int:
        return int(self._kernel.shm_peer(handle))

    def completer(self) -> Completer:
        """What completes the futures of this group's work."""
        self._completer = self._completer or Completer()
        return self._completer

    def _cut(self, whole: Tensor, piece: Tensor) -> list[Tensor]:
        """`whole` as one flat piece for each rank."""
        if whole.numel() != piece.numel() * self.size:
            raise ValueError(
                f"a tensor of {whole.numel()} elements cannot be {self.size} pieces of {piece.numel()} elements."
            )
        return list(whole.reshape(-1).split(piece.numel())) if piece.numel() else [whole] * self.size

    def _rows(self, tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
        if not rows:
            if tensor.shape[0] % self.size:
                raise ValueError(f"{tensor.shape[0]} rows cannot be shared equally by {self.size} ranks.")
            rows = [tensor.shape[0] // self.size] * self.size
        if len(rows) != self.size or sum(rows) != tensor.shape[0]:
            raise ValueError(f"sizes {list(rows)} do not add up to {tensor.shape[0]} rows over {self.size} ranks.")
        return list(tensor.split(list(rows)))


def connect_shm(store: dist.Store, rank: int, ranks: Sequence[int]) -> Shm | None:
    """The shared memory of the ranks of a group, or None (on all of them) when they cannot have one.

    They cannot when they run on different hosts or for different users, or when one has no compiled kernel. The memory
    is an anonymous file: nobody else can open it, and it goes when the last of the processes does, however it ends.
    Collective. Raises RuntimeError when a rank does not answer within the store's time limit.
    """
    size = len(ranks)
    store.set(f"shm/{rank}", f"{os.getpid()} {_place()}")
    told = [store.get(f"shm/{r}").decode().split(" ", 1) for r in range(size)]
    if len({place for _, place in told}) > 1 or not told[0][1]:
        return None
    fixed = kernel().shm_fixed(size, CHUNK, PIPE)
    length = fixed + size * HEAP
    if rank == 0:
        descriptor = os.memfd_create("shardwise", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, length)
        store.set("shm/file", str(descriptor))
    else:
        number = store.get("shm/file").decode()
        descriptor = os.open(f"/proc/{told[0][0]}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    try:
        segment = mmap.mmap(descriptor, length, mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0x4000))
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise CommError(f"rank {rank} cannot map {length >> 30} GiB of addresses for shared memory: {error}.") from None
    stats = [f"/proc/{pid}/stat" for pid, _ in told]
    watched = [-1 if r == rank else os.open(stat, os.O_RDONLY | os.O_CLOEXEC) for r, stat in enumerate(stats)]
    return Shm(segment, rank, ranks, [*watched, descriptor], HEAP)


def _place() -> str:
    """Alike for processes that can share memory; empty where this one cannot."""
    if library() is None or not hasattr(os, "memfd_create"):
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(each) for each in tensors]


def _pointers(tensors: Sequence[Tensor]) -> Any:
    if len(tensors) == 1:
        return ctypes.byref(ctypes.c_void_p(tensors[0].data_ptr()))
    return (ctypes.c_void_p * len(tensors))(*[each.data_ptr() for each in tensors])


def _sizes(tensors: Sequence[Tensor]) -> Any:
    if len(tensors) == 1:
        return ctypes.byref(ctypes.c_uint64(tensors[0].nbytes))
    return (ctypes.c_uint64 * len(tensors))(*[each.nbytes for each in tensors])
