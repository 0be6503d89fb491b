"""`Direct`: the short way from a `Group` to shared memory, for tensors that the kernel takes as they are."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.kernel import Kind
from shardwise.comm.shm import BITWISE, DTYPES, OPERATIONS, REDUCTIONS, Shm
from shardwise.comm.shm_work import ShmFailure
from shardwise.comm.work import GuardedWork, profiling, section
from shardwise.errors import CommError

if TYPE_CHECKING:
    from shardwise.comm.group import Group

SPREAD = (Kind.REDUCE_SCATTER, Kind.SCATTER, Kind.ALL_TO_ALL)  # a rank sends pieces, where others receive them


class Done(dist.Work):
    """The work of an operation that has ended before its caller got any."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


DONE = Done()
SUM = OPERATIONS.SUM  # compared many times faster than looked up


class Direct:
    """One call into the kernel for an operation on contiguous host tensors, whose pieces follow each other in memory.

    Its methods return None where an operation is not of that kind or not in order: the long way takes it, or says what
    is wrong with it. A call that need not return before the operation has ended (`opts.asyncOp` is False) waits inside
    the kernel and returns `DONE`: no helper thread, no handle, nothing to clean up.
    """

    def __init__(self, group: Group, shm: Shm) -> None:
        self._group = group
        self._shm = shm

    def in_place(
        self, op: str, kind: int, tensors: Any, opts: Any, reduction: Any = None, root: int = 0
    ) -> dist.Work | None:
        """all_reduce, reduce, broadcast."""
        tensor = tensors[0] if type(tensors) is list and len(tensors) == 1 else tensors
        code = _code(tensor, reduction) if isinstance(tensor, Tensor) else None
        if code is None or not 0 <= root < self._shm.size:
            return None
        at, nbytes = tensor.data_ptr(), tensor.nbytes
        return self._start(op, (kind | code << 8 | root << 32, at, at, nbytes), nbytes, tensors, (), opts)

    def pieces(
        self,
        op: str,
        kind: Kind,
        whole: Any,
        piece: Tensor,
        opts: Any,
        *,
        results: list[Any],
        reduction: Any = None,
        root: int | None = None,
    ) -> dist.Work | None:
        """all_gather, gather, reduce_scatter, scatter: `whole` is one tensor, or one for each rank (at the root)."""
        code, nbytes = _code(piece, reduction), piece.nbytes
        at = self._begin_of(whole, piece, nbytes) if root is None or root == self._shm.rank else 0
        if code is None or at is None or not 0 <= (root or 0) < self._shm.size:
            return None
        source, target = (at, piece.data_ptr()) if kind in SPREAD else (piece.data_ptr(), at)
        counted = nbytes * self._shm.size if kind == Kind.REDUCE_SCATTER else nbytes
        what = kind | code << 8 | (root or 0) << 32
        return self._start(op, (what, source, target, nbytes), counted, results, (whole, piece), opts)

    def exchange(self, output: Any, input: Any, opts: Any) -> dist.Work | None:
        """all_to_all of equal pieces, of one tensor or of one for each rank."""
        size = self._shm.size
        if not isinstance(input, Tensor) and len(input) != size:
            return None
        first = input if isinstance(input, Tensor) else input[0]
        code, nbytes = _code(first, None), first.nbytes
        if first is input:
            if not first.dim() or first.shape[0] % size:
                return None
            nbytes //= size
        source, target = self._begin_of(input, first, nbytes), self._begin_of(output, first, nbytes)
        if code is None or source is None or target is None:
            return None
        what = Kind.ALL_TO_ALL | code << 8
        results = [output] if isinstance(output, Tensor) else output
        return self._start("all_to_all", (what, source, target, nbytes), nbytes * size, results, input, opts)

    def barrier(self, opts: Any) -> dist.Work | None:
        return self._start("barrier", (0, 0, 0, 0), 0, [], (), opts)

    def _begin_of(self, whole: Any, like: Tensor, nbytes: int) -> int | None:
        """Where the pieces of `nbytes` each begin, one for each rank; None where they do not follow each other."""
        size = self._shm.size
        if isinstance(whole, Tensor):
            fits = (
                whole.dtype == like.dtype and whole.is_cpu and whole.is_contiguous() and whole.nbytes == nbytes * size
            )
            return whole.data_ptr() if fits else None
        if len(whole) != size:
            return None
        begin: int = whole[0].data_ptr()
        for r, piece in enumerate(whole):
            if piece.data_ptr() != begin + r * nbytes or piece.nbytes != nbytes:
                return None
            if piece.dtype != like.dtype or not piece.is_cpu or not piece.is_contiguous():
                return None
        return begin

    def _start(
        self, op: str, arguments: tuple[int, ...], counted: int, results: list[Any], given: Any, opts: Any
    ) -> dist.Work:
        if profiling():
            with section("shm", op):
                return self._perform(op, arguments, counted, results, given, opts.asyncOp)
        return self._perform(op, arguments, counted, results, given, opts.asyncOp)

    def _perform(
        self, op: str, arguments: tuple[int, ...], counted: int, results: Any, given: Any, later: bool
    ) -> dist.Work:
        group, shm = self._group, self._shm
        try:
            with group._lock:  # others may begin operations while this one waits
                sequence = group._enter(op, counted)
                begun = shm.begin(arguments, given, results) if later else None
                handle = 0 if later else shm.post(arguments)
            if not later:
                began = perf_counter()
                begun = shm.end(handle, given, results)
                group.waits.ended(group, sequence, began)
                if begun is None:
                    return DONE
        except CommError:  # the group had ended: nothing was begun
            raise
        except BaseException as error:
            shm.interrupted(error)
            raise
        tag = group._tag(op, sequence)
        if begun is None:
            raise group.failed(tag, ShmFailure(shm.why()))
        work = GuardedWork(group, tag, begun, results, on_stream=False)
        if not later:
            work.wait()
        return work


def _code(tensor: Tensor, reduction: Any) -> int | None:
    """The kernel's number for the type and the reduction; None where it does not take the tensor as it is."""
    code = DTYPES.get(tensor.dtype)
    if code is None or not tensor.is_cpu or not tensor.is_contiguous():
        return None
    if reduction is None or reduction == SUM:
        return code
    op = reduction.op
    number = REDUCTIONS.get(op)
    if number is None or (op in BITWISE and tensor.is_floating_point()):
        return None
    return code | number << 8
