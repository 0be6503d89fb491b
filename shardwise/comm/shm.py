"""`Shm`: collectives and messages between ranks of one host, through memory that they share."""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.heap import Heap
from shardwise.comm.kernel import Kind, Outcome, kernel
from shardwise.comm.shm_work import SLICE_S, ShmFailure, ShmWork, Started, Together

CHUNK = 1 << 20  # bytes that a rank writes before the others read
PIPE = 1 << 20  # bytes that a message may run ahead of its receiver
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

    def __init__(self, segment: mmap.mmap, rank: int, ranks: Sequence[int], files: Sequence[int]) -> None:
        size = len(ranks)
        self.rank = rank
        self.size = size
        self.ranks = tuple(ranks)
        self._process = os.getpid()
        self._files = list(files)  # /proc/PID/stat of each rank, and the segment: the others open it through this one
        self._kernel = kernel()
        self._base = (ctypes.c_char * 1).from_buffer(segment)
        crowded = size > len(os.sched_getaffinity(0))
        names, watched = (ctypes.c_int * size)(*ranks), (ctypes.c_int * size)(*files[:size])
        self.context: int = self._kernel.shm_open_group(
            ctypes.addressof(self._base), rank, size, CHUNK, PIPE, HEAP, crowded, names, watched
        )
        self.heap = Heap(segment, self._kernel.shm_fixed(size, CHUNK, PIPE) + rank * HEAP, HEAP)
        self._orphans: list[tuple[int, Any]] = []
        self._at_exit = functools.partial(_leave, weakref.ref(self))
        atexit.register(self._at_exit)

    def __del__(self) -> None:
        if getattr(self, "context", None) and self._mine():
            self.leave()
            self._kernel.shm_free(self.context)
            for descriptor in self._files:
                if descriptor >= 0:
                    os.close(descriptor)

    def _mine(self) -> bool:
        """False in a forked child: the group, its threads and its memory belong to the rank that made them."""
        return os.getpid() == self._process

    # Failure.

    def abort(self, why: str = "the group was aborted") -> None:
        """All ranks that wait in this group, or call it from now on, get ShmFailure with this text."""
        self._kernel.shm_abort(self.context, why.encode())
        self.heap.close()

    def why(self) -> str:
        """Why the group ended; empty while it lives."""
        text = ctypes.create_string_buffer(1024)
        self._kernel.shm_why(self.context, text, len(text))
        return text.value.decode(errors="replace")

    def leave(self) -> None:
        """Start nothing any more. Others fail when they wait for what this rank has not sent. May be called again."""
        if self._mine():
            atexit.unregister(self._at_exit)
            self._kernel.shm_leave(self.context)

    # Reductions.

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self._each([self._reduced(Kind.ALL_REDUCE, t, [t], [t], opts.reduceOp) for t in tensors])

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        root = opts.rootRank
        return self._each([self._reduced(Kind.REDUCE, t, [t], [t], opts.reduceOp, root=root) for t in tensors])

    def reduce_scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Started:
        works: list[Started] = []
        for output, pieces in zip(outputs, inputs, strict=True):
            self._alike(pieces, output, "inputs of reduce_scatter")
            works.append(self._reduced(Kind.REDUCE_SCATTER, output, pieces, [output], opts.reduceOp))
        return self._each(works)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any) -> Started:
        return self._reduced(Kind.REDUCE_SCATTER, output, self._cut(input, output), [output], opts.reduceOp)

    # Copies.

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Started:
        return self._each([self._moved(Kind.BROADCAST, t, [t], [t], root=opts.rootRank) for t in tensors])

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Started:
        works: list[Started] = []
        for pieces, input in zip(outputs, inputs, strict=True):
            self._alike(pieces, input, "outputs of all_gather", uneven=True)
            _same_size(pieces[self.rank], input, "this rank's own output and input of all_gather")
            works.append(self._moved(Kind.ALL_GATHER, input, [input], pieces, [pieces]))
        return self._each(works)

    def allgather_coalesced(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Started:
        by_input = [[each[i] for each in outputs] for i in range(len(inputs))]
        return self.allgather(by_input, inputs, opts)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any) -> Started:
        whole = output.contiguous()
        back = [] if whole is output else [(output, whole)]
        return self._moved(Kind.ALL_GATHER, input, [input], self._cut(whole, input), [output], back)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Started:
        mine = outputs[0] if self.rank == opts.rootRank else []
        if self.rank == opts.rootRank:
            self._alike(mine, inputs[0], "outputs of gather")
        return self._moved(Kind.GATHER, inputs[0], inputs[:1], mine, [mine], root=opts.rootRank)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> Started:
        mine = inputs[0] if self.rank == opts.rootRank else []
        if self.rank == opts.rootRank:
            self._alike(mine, outputs[0], "inputs of scatter")
        return self._moved(Kind.SCATTER, outputs[0], mine, outputs[:1], root=opts.rootRank)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> ShmWork:
        self._alike(inputs, inputs[0], "inputs of all_to_all", uneven=True)
        self._alike(outputs, inputs[0], "outputs of all_to_all", uneven=True)
        _same_size(outputs[self.rank], inputs[self.rank], "this rank's own output and input of all_to_all")
        return self._moved(Kind.ALL_TO_ALL, inputs[0], inputs, outputs, alike=False)

    def alltoall_base(
        self, output: Tensor, input: Tensor, out_rows: Sequence[int], in_rows: Sequence[int], opts: Any
    ) -> Started:
        whole = output.contiguous()
        works = self.alltoall(self._rows(whole, out_rows), self._rows(input.contiguous(), in_rows), opts)
        if whole is not output:
            works.returns([output], [(output, whole)])
        return works

    def barrier(self, opts: Any) -> Started:
        return self._begun(self._kernel.shm_start, (Kind.BARRIER, 0, 0, 0, 0, 0, None, None, 0, None, None), (), [], ())

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
        self._refuse_root(root)
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
            inputs = [torch.mul(each, reduction.__getstate__()[1]).to(each.dtype) for each in inputs]
            number = 0
        return self._start(kind, code, number, root, like.nbytes, inputs, outputs)

    def _moved(
        self,
        kind: Kind,
        like: Tensor,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        results: Sequence[Any] | None = None,
        back: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        root: int = 0,
        alike: bool = True,
    ) -> ShmWork:
        self._refuse_root(root)
        code, nbytes = DTYPES.get(like.dtype, AS_BYTES), like.nbytes if alike else 0
        return self._start(kind, code, 0, root, nbytes, inputs, outputs, results, back)

    def _start(
        self,
        kind: Kind,
        dtype: int,
        reduction: int,
        root: int,
        nbytes: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        results: Sequence[Any] | None = None,
        back: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> ShmWork:
        landed = [each if each.is_contiguous() else each.detach().contiguous() for each in outputs]
        if kind is Kind.ALL_REDUCE and inputs[0] is outputs[0]:
            given = landed  # in place, or in the place of a copy
        else:
            given = [each if each.is_contiguous() else each.detach().contiguous() for each in inputs]
        copied = [*back, *((o, c) for o, c in zip(outputs, landed, strict=True) if o is not c)]
        return self._begun(
            self._kernel.shm_start,
            (kind, dtype, reduction, root, nbytes, len(given), _pointers(given), _sizes(given))
            + (len(landed), _pointers(landed), _sizes(landed)),
            (given, landed),
            list(results if results is not None else outputs),
            copied,
        )

    def _message(self, kind: Kind, tensor: Tensor, peer: int, tag: int) -> ShmWork:
        landed = tensor.detach().contiguous()
        back = [(tensor, landed)] if kind is Kind.RECV and not tensor.is_contiguous() else []
        arguments = (kind, peer, tag, landed.data_ptr(), landed.nbytes)
        return self._begun(self._kernel.shm_message, arguments, landed, [tensor], back)

    def _work(
        self, start: Any, arguments: tuple[Any, ...], given: Any, results: list[Any], back: Any = ()
    ) -> ShmWork | None:
        """Call the kernel; the work of what it began. None is what it returns for what needs no more waiting."""
        if self._orphans:
            self._sweep()
        try:
            handle = start(self.context, *arguments)
            return ShmWork(self, handle, given, results, back) if handle is not None else None
        except BaseException as error:  # Ctrl-C, after the operation began: nobody would hold its tensors
            self.interrupted(error)
            raise

    def interrupted(self, error: BaseException) -> None:
        """End the group because an operation may be under way whose tensors nobody holds; none is touched any more."""
        self.abort(f"it was interrupted ({type(error).__name__})")
        self._kernel.shm_settle(self.context)

    def _begun(self, *call: Any) -> ShmWork:
        work = self._work(*call)
        if work is None:
            raise ShmFailure(self.why())
        return work

    # The short way, of `Direct`: arguments are those of the kernel's `flat`.

    def post(self, arguments: tuple[int, ...]) -> int:
        """Start an operation for whoever calls `end` with its handle at once, or else `interrupted`."""
        if self._orphans:
            self._sweep()
        handle: int = self._kernel.shm_post(self.context, *arguments)
        return handle

    def end(self, handle: int, given: Any, results: list[Any]) -> ShmWork | None:
        """Wait for it. Its work where it takes long or where the group has failed, None where it has ended."""
        if self._kernel.shm_end(self.context, handle, SLICE_S) == Outcome.OK:
            return None
        return ShmWork(self, handle, given, results, ())

    def begin(self, arguments: tuple[int, ...], given: Any, results: list[Any]) -> ShmWork | None:
        """Start an operation; None where the group has failed."""
        return self._work(self._kernel.shm_begin, arguments, given, results)

    def _each(self, works: list[Started]) -> Started:
        return works[0] if len(works) == 1 else Together(works)

    def drop(self, handle: int, tensors: Any, *, ended: bool) -> None:
        """Nobody holds the work any more. The tensors of an operation under way must live until it has ended."""
        if not self._mine():
            return
        if ended or self.test(handle) != Outcome.AGAIN:
            self._kernel.shm_release(self.context, handle)
        else:
            self._orphans.append((handle, tensors))

    def _sweep(self) -> None:
        orphans, self._orphans = self._orphans, []
        for handle, tensors in orphans:
            self.drop(handle, tensors, ended=False)

    def wait(self, handle: int, slice_s: float) -> int:
        """OK once the operation has ended, AGAIN after `slice_s` seconds, FAILED when the group has."""
        found: int = self._kernel.shm_wait(self.context, handle, slice_s)
        return found

    def test(self, handle: int) -> int:
        found: int = self._kernel.shm_test(self.context, handle)
        return found

    def source(self, handle: int) -> int:
        return int(self._kernel.shm_peer(handle))

    def _cut(self, whole: Tensor, piece: Tensor) -> list[Tensor]:
        """`whole` as one flat piece for each rank."""
        if whole.dtype != piece.dtype or not whole.device.type == piece.device.type == "cpu":
            raise ValueError(
                f"a {whole.dtype} tensor on {whole.device} has no pieces of {piece.dtype} on {piece.device}."
            )
        if whole.numel() != piece.numel() * self.size:
            raise ValueError(
                f"a tensor of {whole.numel()} elements cannot be {self.size} pieces of {piece.numel()} elements."
            )
        return list(whole.reshape(-1).split(piece.numel())) if piece.numel() else [whole] * self.size

    def _refuse_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(f"root {root} is not a rank of this group, which has {self.size}.")

    def _alike(self, pieces: Sequence[Tensor], like: Tensor, what: str, *, uneven: bool = False) -> None:
        """Raises ValueError unless each rank has a piece, of the type and (unless `uneven`) the size of `like`."""
        if len(pieces) != self.size:
            raise ValueError(f"{what}: {len(pieces)} tensors were given for {self.size} ranks.")
        for piece in pieces:
            if piece.dtype != like.dtype or piece.device.type != "cpu" or like.device.type != "cpu":
                raise ValueError(f"{what}: {piece.dtype} on {piece.device} beside {like.dtype} on {like.device}.")
            if not uneven:
                _same_size(piece, like, what)

    def _rows(self, tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
        if not rows:
            if tensor.shape[0] % self.size:
                raise ValueError(f"{tensor.shape[0]} rows cannot be shared equally by {self.size} ranks.")
            rows = [tensor.shape[0] // self.size] * self.size
        if len(rows) != self.size or sum(rows) != tensor.shape[0]:
            raise ValueError(f"sizes {list(rows)} do not add up to {tensor.shape[0]} rows over {self.size} ranks.")
        return list(tensor.split(list(rows)))


def _leave(shm: weakref.ref[Shm]) -> None:
    alive = shm()
    if alive is not None:
        alive.leave()


def _same_size(one: Tensor, other: Tensor, what: str) -> None:
    if one.numel() != other.numel():
        raise ValueError(f"{what} have {one.numel()} and {other.numel()} elements.")


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
