"""A server of a parameter server as a worker sees it: in its own process, or on another rank. Both do the same."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from shardwise.comm.param_serve import Server, Wanted, pick_rows, send_wanted
from shardwise.comm.param_store import NOTHING, Gradients, Push, Store
from shardwise.comm.param_wire import (
    ANSWER,
    ANSWERED,
    ANSWERED_ROWS,
    PIECE,
    REQUEST,
    ROWS,
    SAID,
    Answer,
    Kind,
    Line,
    Request,
    Sent,
    empty_answer,
    pack_push,
    pack_request,
    unpack_answer,
)

Rows = tuple[Tensor, Tensor]  # indices and values
PATIENCE_S = 10.0  # beyond the group's limit: a server that gives up says for whom it waited


class Peer(Protocol):
    """What a worker asks of one server. A question may be asked of all servers before the first answer is taken."""

    def ask(self, request: Request, wanted: Wanted) -> None:
        """Ask to start a clock and for the parameters."""

    def pulled(self, pieces: Sequence[Tensor], tables: Sequence[Tensor]) -> Answer:
        """Wait for the answer to `ask`; the pieces and rows of this server that have changed are filled in."""

    def start(self, request: Request) -> Answer:
        """Ask to start a clock, wait for the answer."""

    def count(self, clock: int) -> Answer:
        """Ask whether a gradient is in time."""

    def begin(self, clock: int) -> None:
        """The pieces of a gradient follow."""

    def piece(self, flat: int, values: Tensor) -> None:
        """Send this server's piece of a flat; `values` must not change before `end` returns."""

    def end(self, said: Push, rows: Sequence[Rows]) -> None:
        """The gradient is whole. Returns once all of it has left."""

    def nothing(self, clock: int) -> None:
        """This worker has no gradient of a clock, and is not late."""

    def skip(self, clock: int) -> None:
        """This worker gives a clock up."""

    def leave(self) -> None:
        """This worker will ask nothing more."""


class Here:
    """A server in this process: no message, one copy."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._me = server.group.rank()
        self._asked: tuple[Request, Wanted] | None = None
        self._gradients: Gradients | None = None
        self._clock = 0

    def ask(self, request: Request, wanted: Wanted) -> None:
        self._asked = request, wanted

    def pulled(self, pieces: Sequence[Tensor], tables: Sequence[Tensor]) -> Answer:
        assert self._asked is not None
        request, wanted = self._asked

        def read(store: Store) -> None:
            if store.version != wanted.version:
                for mine, piece in zip(pieces, store.pieces, strict=True):
                    mine.copy_(piece)
            for table, (at, values) in zip(tables, pick_rows(store, wanted), strict=True):
                table[at] = values

        return self._server.pull(self._me, request, read)

    def start(self, request: Request) -> Answer:
        return self._server.start(self._me, request)

    def count(self, clock: int) -> Answer:
        return self._server.count(self._me, clock)

    def begin(self, clock: int) -> None:
        self._gradients, self._clock = self._server.spare(), clock

    def piece(self, flat: int, values: Tensor) -> None:
        assert self._gradients is not None
        self._gradients.pieces[flat].copy_(values)

    def end(self, said: Push, rows: Sequence[Rows]) -> None:
        assert self._gradients is not None
        for mine, (at, values) in zip(self._gradients.rows, rows, strict=True):
            if len(at):
                mine.append((at, values))
        gradients, self._gradients = self._gradients, None
        self._server.push(self._me, self._clock, said, gradients)

    def nothing(self, clock: int) -> None:
        self._server.push(self._me, clock, NOTHING, self._server.spare())

    def skip(self, clock: int) -> None:
        self._server.skip(self._me, clock)

    def leave(self) -> None:
        return None


class There:
    """A server on another rank."""

    def __init__(self, line: Line, workers: int) -> None:
        self._line = line
        self._workers = workers
        self._limit = timedelta(seconds=line.group.timeout_s + PATIENCE_S)
        self._sent: list[Sent] = []
        self._wanted: Wanted | None = None

    def ask(self, request: Request, wanted: Wanted) -> None:
        self._wanted = wanted
        self._tell(request)
        send_wanted(self._line, wanted)

    def pulled(self, pieces: Sequence[Tensor], tables: Sequence[Tensor]) -> Answer:
        assert self._wanted is not None
        answer = self._answer()
        if answer.version != self._wanted.version:
            for piece in pieces:
                self._line.receive(piece, ANSWERED)
        for table in tables:
            count = int(self._line.receive(torch.zeros(1, dtype=torch.int64), ANSWERED_ROWS))
            if count:
                at = self._line.receive(torch.empty(count, dtype=torch.int64), ANSWERED_ROWS)
                table[at] = self._line.receive(table.new_empty(count, *table.shape[1:]), ANSWERED_ROWS)
        return answer

    def start(self, request: Request) -> Answer:
        self._tell(request._replace(kind=Kind.START))
        return self._answer()

    def count(self, clock: int) -> Answer:
        self._tell(Request(Kind.COUNT, clock))
        return self._answer()

    def begin(self, clock: int) -> None:
        self._sent.append(self._line.send(pack_request(Request(Kind.PUSH, clock)), REQUEST))

    def piece(self, flat: int, values: Tensor) -> None:
        self._sent.append(self._line.send(values, PIECE))

    def end(self, said: Push, rows: Sequence[Rows]) -> None:
        self._sent.append(self._line.send(pack_push(said, [len(at) for at, _ in rows]), SAID))
        for at, values in rows:
            if len(at):
                self._sent += [self._line.send(at, ROWS), self._line.send(values, ROWS)]
        sent, self._sent = self._sent, []
        for each in sent:
            each.work.wait()

    def nothing(self, clock: int) -> None:
        self._tell(Request(Kind.NOTHING, clock))

    def skip(self, clock: int) -> None:
        self._tell(Request(Kind.SKIP, clock))

    def leave(self) -> None:
        self._tell(Request(Kind.BYE))

    def _tell(self, request: Request) -> None:
        self._line.send(pack_request(request), REQUEST).work.wait()

    def _answer(self) -> Answer:
        return unpack_answer(self._line.receive(empty_answer(self._workers), ANSWER, self._limit))
