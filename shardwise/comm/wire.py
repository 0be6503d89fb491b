"""`Wire`: runs the schedules of `algorithms.py` over a backend's send and receive, whichever backend that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from shardwise.comm.algorithms import Message, Schedule, Step, schedule
from shardwise.comm.store import first_line

TAGS = 1 << 28  # messages of algorithms have tags from here on, one for each segment; callers' own are below
ALIGNED = 64  # bytes

Combine = Callable[..., Tensor]
OPERATIONS: Any = dist.ReduceOp.RedOpType
COMBINE: dict[Any, Combine] = {
    OPERATIONS.SUM: torch.add,
    OPERATIONS.PRODUCT: torch.mul,
    OPERATIONS.MIN: torch.minimum,
    OPERATIONS.MAX: torch.maximum,
    OPERATIONS.BAND: torch.bitwise_and,
    OPERATIONS.BOR: torch.bitwise_or,
    OPERATIONS.BXOR: torch.bitwise_xor,
}


class LinkFailure(RuntimeError):
    """A message to or from `rank` did not get through."""

    def __init__(self, rank: int, why: BaseException) -> None:
        super().__init__(f"the connection to rank {rank} ended: {first_line(why)}")
        self.rank = rank


class Pending(NamedTuple):
    """A message under way to or from the rank called `name`."""

    work: Any
    name: int

    def wait(self) -> None:
        """Until it has ended: gloo closes its connections when a wait for a message runs out. Raises LinkFailure."""
        try:
            self.work.wait()
        except RuntimeError as error:
            raise LinkFailure(self.name, error) from None


class Wire:
    """Send and receive of one backend, for one user at a time; `names` are what its ranks are called in errors.

    `sent` counts the bytes that were handed to it.
    """

    def __init__(self, backend: Any, names: Sequence[int] = ()) -> None:
        self.backend = backend
        self.sent = 0
        self._names = names
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._running: list[_Segment] = []  # after a failure the backend may still write into their tensors

    def run(
        self,
        collective: str,
        algorithm: str,
        tensor: Tensor,
        members: Sequence[int],
        place: int,
        *,
        combine: Combine | None = None,
        root: int = 0,
        segments: int = 1,
    ) -> None:
        """Do this rank's part; it is `members[place]`, and `members` are the backend's ranks that take part.

        `tensor` is 1-D and contiguous and holds the result in the end. For all_gather and reduce_scatter it has a piece
        for each member and is not cut into segments. Raises LinkFailure.
        """
        plan = schedule(collective, algorithm, place, len(members), root)
        parts = _cuts(tensor.numel(), segments if collective not in ("all_gather", "reduce_scatter") else 1)
        run = [_Segment(self, plan, tensor[a:b], members, place, combine, TAGS + i) for i, (a, b) in enumerate(parts)]
        self._running = run
        self._reserve(sum(segment.scratch for segment in run))
        free = 0
        for segment in run:
            segment.scratch_at = free
            free += segment.scratch
        # The same order on every rank: by round, a segment a round behind the one before. Whoever waits has posted all
        # that comes earlier in it, so somebody can always go on.
        order = sorted((step.round + i, -i, at) for i, _ in enumerate(run) for at, step in enumerate(plan.steps))
        for _, minus, at in order:
            run[-minus].finish()
            run[-minus].start(plan.steps[at])
        for segment in run:
            segment.finish()
        self._running = []

    def send(self, tensor: Tensor, rank: int, tag: int = TAGS) -> Pending:
        self.sent += tensor.nbytes
        return self._post(self.backend.send, tensor, rank, tag)

    def receive(self, tensor: Tensor, rank: int, tag: int = TAGS) -> Pending:
        return self._post(self.backend.recv, tensor, rank, tag)

    def _post(self, call: Callable[..., Any], tensor: Tensor, rank: int, tag: int) -> Pending:
        name = self._names[rank] if self._names else rank
        try:
            return Pending(call([tensor], rank, tag), name)
        except RuntimeError as error:
            raise LinkFailure(name, error) from None

    def _reserve(self, nbytes: int) -> None:
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)

    def scratch(self, at: int, like: Tensor) -> Tensor:
        return self._scratch[at : at + like.nbytes].view(like.dtype)


class _Segment:
    """A part of a tensor on its way through the rounds."""

    def __init__(
        self,
        wire: Wire,
        plan: Schedule,
        part: Tensor,
        members: Sequence[int],
        place: int,
        combine: Combine | None,
        tag: int,
    ) -> None:
        self._wire = wire
        self._part = part
        self._members = members
        self._place = place
        self._combine = combine
        self._tag = tag
        self._at = [part.numel() * i // plan.pieces for i in range(plan.pieces + 1)]
        self._under_way: list[Pending] = []
        self._terms: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        added = [self._piece(m) for step in plan.steps for m in step.receives if m.add]
        self.scratch = sum(_aligned(piece.nbytes) for piece in added)
        self.scratch_at = 0

    def start(self, step: Step) -> None:
        """Post what a round receives and sends."""
        for message in step.receives:
            piece = self._piece(message)
            if message.add and piece.numel():
                landed = self._wire.scratch(self.scratch_at, piece)
                self.scratch_at += _aligned(piece.nbytes)
                self._terms.setdefault((message.first, message.last), []).append((message.peer, landed))
                piece = landed
            self._post(self._wire.receive, message.peer, piece)
        for message in step.sends:
            self._post(self._wire.send, message.peer, self._piece(message))

    def finish(self) -> None:
        """Wait for what was posted, and add what arrived to what was here, in the order of ranks."""
        for message in self._under_way:
            message.wait()
        self._under_way.clear()
        for (first, last), terms in self._terms.items():
            own = self._part[self._at[first] : self._at[last]]
            assert self._combine is not None
            _add_in_order(own, self._place, terms, self._combine)
        self._terms.clear()

    def _post(self, call: Callable[[Tensor, int, int], Pending], peer: int, piece: Tensor) -> None:
        if piece.numel():  # else the other end has nothing to do with it either
            self._under_way.append(call(piece, self._members[peer], self._tag))

    def _piece(self, message: Message) -> Tensor:
        return self._part[self._at[message.first] : self._at[message.last]]


def _add_in_order(own: Tensor, place: int, terms: Sequence[tuple[int, Tensor]], combine: Combine) -> None:
    """`own` becomes the combination of all terms and itself, in the order of their ranks."""
    before = [term for peer, term in terms if peer < place]
    if before:
        total = before[0]
        for term in before[1:]:
            combine(total, term, out=total)
        combine(total, own, out=own)
    for peer, term in terms:
        if peer > place:
            combine(own, term, out=own)


def _cuts(numel: int, count: int) -> list[tuple[int, int]]:
    """`count` nearly equal parts, fewer where there are fewer elements."""
    count = max(1, min(count, numel))
    return [(numel * i // count, numel * (i + 1) // count) for i in range(count)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED
