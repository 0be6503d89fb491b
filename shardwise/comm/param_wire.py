"""Messages between a worker and a server of a parameter server: what they mean, in numbers. No pickle.

worker -> server                                          server -> worker
START  clock, samples, seconds, seen                      answer
PULL   the same, bound, then one line a table             answer, then pieces and rows that have changed
COUNT  clock                                              answer: late when the gradient comes too late
PUSH   clock, then pieces, said, rows of each table
NOTHING, SKIP   clock
BYE
"""

from __future__ import annotations

import enum
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.comm.deal import Deal
from shardwise.comm.group import Group
from shardwise.comm.param_store import Push

# Tags: what a worker sends to a server, then what a server sends to a worker, which may be between the same two ranks.
REQUEST, PIECE, SAID, ROWS = range(71, 75)
ANSWER, ANSWERED, ANSWERED_ROWS = range(75, 78)
TOTALS = 8  # of so many clocks, the newest, an answer tells the loss
IDLE = timedelta(days=365)  # a server that waits for a request waits for nobody: it ends with the group


class Kind(enum.IntEnum):
    """What a request is."""

    START = 0
    PULL = 1
    COUNT = 2
    PUSH = 3
    NOTHING = 4
    SKIP = 5
    BYE = 6


class Request(NamedTuple):
    """`samples` of the worker's last clock took it `seconds`; it knows deal number `seen`. `bound` -1: the rule's."""

    kind: Kind
    clock: int = 0
    bound: int = -1
    samples: int = 0
    seconds: float = 0.0
    seen: int = 0


class Total(NamedTuple):
    """The loss sum and the weight of all gradients of a clock."""

    clock: int
    loss_sum: float
    weight: float


class Answer(NamedTuple):
    """`late`: the clock is over. `done` clocks are in the parameters, which are those of `version`.

    `deal` is the newest, number `deals` - 1; `totals` are those of finished clocks that this worker was not told yet.
    """

    late: bool
    done: int
    version: int
    deals: int
    deal: Deal
    totals: tuple[Total, ...]


class Line:
    """Messages to and from one other rank of the group (`peer` is its place there)."""

    def __init__(self, group: Group, peer: int) -> None:
        self.group = group
        self.peer = peer

    def send(self, tensor: Tensor, tag: int) -> Sent:
        return Sent(self.group.send([tensor], self.peer, tag), tensor)

    def receive(self, tensor: Tensor, tag: int, limit: timedelta | None = None) -> Tensor:
        """Fill `tensor` with the next message of that tag."""
        work = self.group.recv([tensor], self.peer, tag)
        if limit is None:
            work.wait()
        else:
            work.wait(limit)
        return tensor


class Sent(NamedTuple):
    """A message on its way; the tensor must not change before it is gone."""

    work: torch.distributed.Work
    tensor: Tensor


def pack_request(request: Request) -> Tensor:
    return torch.tensor(request, dtype=torch.float64)


def unpack_request(row: Tensor) -> Request:
    kind, clock, bound, samples, seconds, seen = row.tolist()
    return Request(Kind(int(kind)), int(clock), int(bound), int(samples), seconds, int(seen))


def empty_request() -> Tensor:
    return torch.zeros(len(Request._fields), dtype=torch.float64)


def pack_push(said: Push, rows: list[int]) -> Tensor:
    """`rows`: how many rows of each table follow."""
    head = [said.loss_sum, said.weight, said.scale, said.expected]
    return torch.tensor([*head, *map(float, said.used), *rows], dtype=torch.float64)


def unpack_push(row: Tensor, tables: int) -> tuple[Push, list[int]]:
    loss_sum, weight, scale, expected, *rest = row.tolist()
    used, rows = rest[: len(rest) - tables], rest[len(rest) - tables :]
    return Push(loss_sum, weight, scale, expected, tuple(map(bool, used))), [int(count) for count in rows]


def empty_push(tensors: int, tables: int) -> Tensor:
    return torch.zeros(4 + tensors + tables, dtype=torch.float64)


def pack_answer(answer: Answer) -> Tensor:
    totals = [*answer.totals, *[Total(-1, 0.0, 0.0)] * TOTALS][:TOTALS]
    head = [answer.late, answer.done, answer.version, answer.deals, answer.deal.start]
    return torch.tensor([*head, *(x for total in totals for x in total), *answer.deal.shares], dtype=torch.float64)


def unpack_answer(row: Tensor) -> Answer:
    late, done, version, deals, start, *rest = row.tolist()
    cells, shares = rest[: 3 * TOTALS], rest[3 * TOTALS :]
    totals = [Total(int(c), loss, weight) for c, loss, weight in zip(*[iter(cells)] * 3, strict=True) if c >= 0]
    return Answer(bool(late), int(done), int(version), int(deals), Deal(int(start), tuple(shares)), tuple(totals))


def empty_answer(workers: int) -> Tensor:
    return torch.zeros(5 + 3 * TOTALS + workers, dtype=torch.float64)
