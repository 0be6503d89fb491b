"""`ShmTorch`: what `Shm` does, in Python and torch alone, where there is no compiled kernel, and to compare it with."""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import mmap
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardwise.comm.heap import Heap
from shardwise.comm.kernel import Kind, Outcome
from shardwise.comm.shm import HEAP, Shm, _leave
from shardwise.comm.shm_work import ShmFailure, ShmWork
from shardwise.comm.torch_messages import Messages
from shardwise.comm.torch_phases import Op, Phases, Steps
from shardwise.comm.torch_segment import Segment, fixed_bytes

POLL_S = 100e-6  # how long a wait looks again and again before it sleeps
NAP_S, LONGEST_NAP_S = 20e-6, 500e-6
LOOK_S = 5e-3  # how often a wait looks whether the others live
HELP_S = 1e-3  # how often the helper goes on with what nobody waits for
LINGER = 20  # times that it finds nothing to do before it sleeps
EXITING = 4  # PF_EXITING among the flags in /proc/PID/stat: it is set before the process's memory is given back


class ShmTorch(Shm):
    """The same operations over a segment of its own kind. Tensors of an operation live until it has ended."""

    def __init__(self, segment: mmap.mmap, rank: int, ranks: Sequence[int], files: Sequence[int]) -> None:
        size = len(ranks)
        self.rank = rank
        self.size = size
        self.ranks = tuple(ranks)
        self._process = os.getpid()
        self._files = list(files)
        first = fixed_bytes(size)
        self.heap = Heap(segment, first + rank * HEAP, HEAP)
        shared = Segment(segment, rank, size)
        heaps = [(shared.start + first + r * HEAP, HEAP) for r in range(size)]
        self._driver = Driver(shared, ranks, files, Phases(shared, ranks, heaps))
        self._at_exit = functools.partial(_leave, weakref.ref(self))
        atexit.register(self._at_exit)

    def __del__(self) -> None:
        if hasattr(self, "_driver") and self._mine():
            self.leave()
            for descriptor in self._files:
                if descriptor >= 0:
                    os.close(descriptor)

    def abort(self, why: str = "the group was aborted") -> None:
        self._driver.segment.fail(why)
        self.heap.close()

    def why(self) -> str:
        return self._driver.segment.why()

    def leave(self) -> None:
        if self._mine():
            atexit.unregister(self._at_exit)
            self._driver.leave()

    def barrier(self, opts: Any) -> ShmWork:
        return self._begin(Op(Kind.BARRIER, (), (), 0), [], ())

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
        landed = [each.detach().contiguous() for each in outputs]
        in_place = kind is Kind.ALL_REDUCE and inputs[0] is outputs[0]
        given = landed if in_place else [each.detach().contiguous() for each in inputs]
        copied = [(o, c) for o, c in zip(outputs, landed, strict=True) if not o.is_contiguous()]
        op = Op(kind, given, landed, nbytes, dtype, reduction, root)
        return self._begin(op, list(results if results is not None else outputs), [*back, *copied])

    def _message(self, kind: Kind, tensor: Tensor, peer: int, tag: int) -> ShmWork:
        landed = tensor.detach().contiguous()
        op = Op(kind, [landed], [landed], landed.nbytes)
        op.peer, op.tag = peer, tag
        return self._begin(op, [tensor], [] if tensor.is_contiguous() or kind is Kind.SEND else [(tensor, landed)])

    def _begin(self, op: Op, results: list[Any], back: Sequence[tuple[Tensor, Tensor]]) -> ShmWork:
        self._driver.start(op)
        if not op.done and self._driver.segment.failed:
            raise ShmFailure(self.why())
        return ShmWork(self, op, None, results, back)  # type: ignore[arg-type]

    def drop(self, handle: Any, tensors: Any, *, ended: bool) -> None:
        """Nothing to do: an operation that nobody holds any more goes on and keeps its tensors."""

    def wait(self, handle: Any, slice_s: float) -> int:
        return self._driver.wait(handle, slice_s)

    def test(self, handle: Any) -> int:
        return self._driver.test(handle)

    def source(self, handle: Any) -> int:
        return int(handle.peer)


class Driver:
    """Who does the work: the thread that waits for an operation, or a helper thread when nobody does."""

    def __init__(self, segment: Segment, names: Sequence[int], watched: Sequence[int], phases: Phases) -> None:
        self.segment = segment
        self._names = names
        self._watched = watched
        self._phases = phases
        self._messages = Messages(segment, names)
        self._crowded = segment.size > len(os.sched_getaffinity(0))
        self._started: collections.deque[Op] = collections.deque()
        self._queue: collections.deque[Op] = collections.deque()
        self._now: Steps | None = None
        self._busy = threading.Lock()
        self._waited_at = 0.0
        self._closing = False
        self._work = threading.Event()
        self._helper: threading.Thread | None = None

    def start(self, op: Op) -> None:
        self._started.append(op)
        if self._helper is None and not self._closing:
            self._helper = threading.Thread(target=self._help, name="shm helper", daemon=True)
            self._helper.start()
        self._work.set()
        self._go_on()

    def test(self, op: Op) -> int:
        """OK once `op` has ended, FAILED when the group has, else AGAIN."""
        if not op.done:
            self._go_on()
        return Outcome.OK if op.done else Outcome.FAILED if self.segment.failed else Outcome.AGAIN

    def wait(self, op: Op, slice_s: float) -> int:
        """The same, after at most `slice_s` seconds."""
        began = looked = moved = time.monotonic()
        moves, nap = -1, NAP_S
        while (state := self.test(op)) == Outcome.AGAIN:
            self._waited_at = now = time.monotonic()
            if moves != self.segment.moves:
                moves, moved, nap = self.segment.moves, now, NAP_S
            if now - began >= slice_s:
                break
            if now - looked >= LOOK_S:
                looked = now
                self._look_around(op)
            if now - moved < POLL_S:
                if self._crowded:
                    os.sched_yield()
                continue
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP_S)
        return state

    def leave(self) -> None:
        """Start nothing any more; no thread runs afterwards."""
        self.segment.leave()
        self._closing = True
        self._work.set()
        if self._helper not in (None, threading.current_thread()):
            self._helper.join()

    def _go_on(self, *, patient: bool = False) -> None:
        """As far as the others let it, unless another thread is at it. What goes wrong ends the group."""
        if self._busy.acquire(blocking=patient):
            try:
                while self._started or self._queue or self._now:
                    self._take_started()
                    if self.segment.failed or not self._advance():
                        break
                if not self.segment.failed:
                    self._messages.advance()
            except ShmFailure as failure:
                self.segment.fail(str(failure))
            except BaseException as error:  # also Ctrl-C in the middle of a phase, which cannot be taken up again
                name = self._names[self.segment.rank]
                self.segment.fail(f"rank {name} could not go on: {type(error).__name__} {error}")
                raise
            finally:
                self._busy.release()

    def _take_started(self) -> None:
        while self._started:
            op = self._started[0]
            if op.kind in (Kind.SEND, Kind.RECV):
                self._messages.post(op)
            else:
                self._queue.append(op)
            self._started.popleft()  # only now: the helper must not see nothing to do

    def _advance(self) -> bool:
        """Whether the first collective of the queue ended."""
        if self._now is None and self._queue:
            self._now = self._phases.steps(self._queue[0])
        if self._now is None or next(self._now, self) is not self:
            return False
        self._queue.popleft().done = True
        self._now = None
        return True

    # The others.

    def _look_around(self, op: Op | None) -> None:
        """End the group if a rank died, or left while `op` waits for it; both may have sent before all that is due."""
        dead, gone = self._first_dead(), self._gone(op) if op else -1
        if dead < 0 and gone < 0:
            return
        self._go_on(patient=True)
        if (op.done if op else not self._open()) or self.segment.failed:
            return
        name = self._names[max(dead, gone)]
        self.segment.fail(f"rank {name} died" if dead >= 0 else f"rank {name} left the group before it took part")

    def _first_dead(self) -> int:
        return next((r for r in self.segment.others if not self.segment.has_left(r) and _dead(self._watched[r])), -1)

    def _gone(self, op: Op) -> int:
        """The rank that `op` waits for in vain because it left, or -1; a message from anybody needs only one."""
        left = [r for r in self.segment.others if self.segment.has_left(r)]
        if op.kind in (Kind.SEND, Kind.RECV):
            if op.peer < 0:
                return left[0] if left == self.segment.others else -1
            return op.peer if op.peer in left else -1
        mine = self.segment.count(self.segment.rank)
        return next((r for r in left if self.segment.count(r) < mine), -1)

    def _open(self) -> bool:
        return bool(self._started or self._queue or self._messages.open)

    def _help(self) -> None:
        idle = 0
        while not self._closing:
            if self._open() and not self.segment.failed:
                idle = 0
                if time.monotonic() - self._waited_at > HELP_S:
                    with contextlib.suppress(Exception):  # it has ended the group, and says why to those that wait
                        self._go_on()
                    self._look_around(None)
            elif (idle := idle + 1) > LINGER:
                self._work.clear()
                if not self._open() or self.segment.failed:
                    self._work.wait()
                idle = 0
            time.sleep(HELP_S)


def _dead(stat: int) -> bool:
    """Whether the process is gone or going, from its open /proc/PID/stat."""
    try:
        raw = os.pread(stat, 512, 0)
    except ProcessLookupError:
        return True
    state, *_, flags = raw.rpartition(b")")[2].split()[:7]
    return state in (b"Z", b"X") or int(flags) & EXITING != 0
