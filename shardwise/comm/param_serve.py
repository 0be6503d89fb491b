"""One server of a parameter server: a store under a lock, its clocks, and a thread for each worker elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardwise.comm import clocks, deal
from shardwise.comm.clocks import Rule
from shardwise.comm.group import Group
from shardwise.comm.param_store import NOTHING, Gradients, Push, Store
from shardwise.comm.param_wire import (
    ANSWER,
    ANSWERED,
    ANSWERED_ROWS,
    IDLE,
    PIECE,
    REQUEST,
    ROWS,
    SAID,
    TOTALS,
    Answer,
    Kind,
    Line,
    Request,
    Total,
    empty_push,
    empty_request,
    pack_answer,
    unpack_push,
    unpack_request,
)
from shardwise.comm.work import SLICE_S
from shardwise.errors import CommError, ShardwiseError


class Server:
    """Serves one store to `workers` (places in the group) from `clock` on.

    The workers of this process call its methods; those of others are answered by a thread each after `start`. A
    failure (of a worker, of the optimizer) aborts the group and is raised in every call here. With `leads` this server
    also decides which gradients of a clock count, and deals the samples: anew from `ahead` clocks later on, never when
    that is 0.
    """

    def __init__(
        self, group: Group, store: Store, rule: Rule, workers: Sequence[int], clock: int, *, leads: bool, ahead: int
    ) -> None:
        self.group = group
        self.store = store
        self.workers = tuple(workers)
        self._turn = threading.Condition()
        self._clocks = clocks.begin(rule, list(workers), clock)
        self._counting = clocks.begin(rule, list(workers), clock) if leads and rule.backup else None
        self._dealing = deal.open_dealing(len(self.workers), clock)
        self._leads = leads
        self._ahead = ahead
        self._furthest = clock  # that any worker was let start
        self._answers: dict[tuple[str, int], bool] = {}
        self._sums: dict[int, Gradients] = {}
        self._open: dict[int, list[float]] = {}  # loss sum and weight of clocks that are not done
        self._told = dict.fromkeys(workers, clock)  # each worker knows the totals of the clocks below
        self._totals: list[Total] = []
        self._threads: dict[int, threading.Thread] = {}
        self._failure: BaseException | None = None

    # For the worker in this process, and for the threads.

    def start(self, worker: int, request: Request) -> Answer:
        """Wait until `worker` may count itself in at a clock; only where this server decides what counts."""
        self._report(worker, request)
        assert self._counting is not None
        with self._turn:
            return self._answer(worker, self._wait("counting", worker, request.clock, 0))

    def pull(self, worker: int, request: Request, read: Callable[[Store], object]) -> Answer:
        """Wait until `worker` may start a clock, then `read` the parameters as they are at that moment."""
        if self._counting is None:
            self._report(worker, request)
        bound = None if request.bound < 0 else request.bound
        with self._turn:
            late = self._wait("clocks", worker, request.clock, bound)
            read(self.store)
            return self._answer(worker, late)

    def count(self, worker: int, clock: int) -> Answer:
        """Whether the gradient that `worker` has ready is among the first of its clock (`late` when it is not)."""
        with self._turn:
            self._check()
            assert self._counting is not None
            self._counting, actions = clocks.advance(self._counting, clocks.Push(worker, clock))
            self._note("counting", actions)
            return self._answer(worker, any(isinstance(action, clocks.Drop) for action in actions))

    def push(self, worker: int, clock: int, said: Push, gradients: Gradients) -> None:
        """Take a gradient over; it is added to its clock's, or applied, as the rule says."""
        with self._turn:
            self._check()
            total = self._open.setdefault(clock, [0.0, 0.0])
            total[0] += said.loss_sum
            total[1] += said.weight
            self._clocks, actions = clocks.advance(self._clocks, clocks.Push(worker, clock))
            for action in actions:
                if isinstance(action, clocks.Add):
                    if said.weight:
                        self._sums.setdefault(clock, self.store.spare()).take(said, gradients)
                elif isinstance(action, clocks.Update):
                    self._update(action.clock, said, gradients)
            self.store.put_back(gradients)
            self._note("clocks", actions)

    def skip(self, worker: int, clock: int) -> None:
        """`worker` gives this clock up."""
        with self._turn:
            self._check()
            self._clocks, actions = clocks.advance(self._clocks, clocks.Skip(worker, clock))
            self._note("clocks", actions)
            if self._counting is not None and self._counting.finished[worker] == clock:
                self._counting, actions = clocks.advance(self._counting, clocks.Skip(worker, clock))
                self._note("counting", actions)

    def spare(self) -> Gradients:
        with self._turn:
            return self.store.spare()

    def put_back(self, gradients: Gradients) -> None:
        with self._turn:
            self.store.put_back(gradients)

    # Threads.

    def open(self) -> None:
        """Start to serve the workers of other processes."""
        for worker in self.workers:
            if worker != self.group.rank():
                thread = threading.Thread(target=self._serve, args=(worker,), daemon=True, name=f"serves {worker}")
                self._threads[worker] = thread
                thread.start()

    def close(self) -> None:
        """Wait until every worker has left. Raises CommError when one does not within the group's limit."""
        end = time.monotonic() + self.group.timeout_s
        while left := [worker for worker, thread in self._threads.items() if thread.is_alive()]:
            self._threads[left[0]].join(SLICE_S)
            self._check()
            if time.monotonic() > end:
                raise self.give_up(f"{self._ranks(left)} did not leave within {self.group.timeout_s:g} s")
        self._check()

    def give_up(self, why: str) -> CommError:
        """Abort the group, and the error to raise."""
        self.group.abort(why)
        return CommError(f"{self._who()} gave up: {why}. Look at the end of the other ranks' logs for the cause.")

    def _serve(self, worker: int) -> None:
        line = Line(self.group, worker)
        try:
            while True:
                request = unpack_request(line.receive(empty_request(), REQUEST, IDLE))
                if request.kind is Kind.BYE:
                    return
                self._obey(worker, line, request)
        except BaseException as error:  # whatever it is, nobody may go on waiting for this server
            with self._turn:
                self._failure = self._failure or error
                self._turn.notify_all()
            if not isinstance(error, CommError):
                self.group.abort(f"{self._who()} failed: {error}")

    def _obey(self, worker: int, line: Line, request: Request) -> None:
        match request.kind:
            case Kind.START:
                line.send(pack_answer(self.start(worker, request)), ANSWER).work.wait()
            case Kind.COUNT:
                line.send(pack_answer(self.count(worker, request.clock)), ANSWER).work.wait()
            case Kind.NOTHING:
                self.push(worker, request.clock, NOTHING, self.spare())
            case Kind.SKIP:
                self.skip(worker, request.clock)
            case Kind.PULL:
                self._send_parameters(worker, line, request)
            case Kind.PUSH:
                self._receive_gradients(worker, line, request.clock)

    def _receive_gradients(self, worker: int, line: Line, clock: int) -> None:
        gradients = self.spare()
        for piece in gradients.pieces:
            line.receive(piece, PIECE)
        tables = self.store.tables
        said, counts = unpack_push(line.receive(empty_push(len(self.store.like), len(tables)), SAID), len(tables))
        for rows, table, count in zip(gradients.rows, tables, counts, strict=True):
            if count:
                at = line.receive(torch.empty(count, dtype=torch.int64), ROWS)
                rows.append((at, line.receive(table.new_empty(count, *table.shape[1:]), ROWS)))
        self.push(worker, clock, said, gradients)

    def _send_parameters(self, worker: int, line: Line, request: Request) -> None:
        wanted = receive_wanted(line, self.store)
        copy = self.spare()
        rows: list[tuple[Tensor, Tensor]] = []

        def read(store: Store) -> None:
            if wanted.version != store.version:
                for mine, piece in zip(copy.pieces, store.pieces, strict=True):
                    mine.copy_(piece)
            rows.extend(pick_rows(store, wanted))

        answer = self.pull(worker, request, read)
        sent = [line.send(pack_answer(answer), ANSWER)]
        if wanted.version != answer.version:
            sent += [line.send(piece, ANSWERED) for piece in copy.pieces]
        for at, values in rows:
            sent += [line.send(torch.tensor([len(at)]), ANSWERED_ROWS)]
            sent += [line.send(at, ANSWERED_ROWS), line.send(values, ANSWERED_ROWS)] if len(at) else []
        for each in sent:
            each.work.wait()
        self.put_back(copy)

    # Inside; the lock is held but for `_report`.

    def _update(self, clock: int, said: Push, gradients: Gradients) -> None:
        if not self._clocks.rule.at_once:
            sums = self._sums.pop(clock, None)
            if sums is not None:
                self.store.update(clock, sums)
                self.store.put_back(sums)
        elif said.weight:
            sums = self.store.spare()
            sums.take(said, gradients)
            self.store.update(clock, sums, min(1.0, said.weight / said.expected) if said.expected else 1.0)
            self.store.put_back(sums)

    def _wait(self, name: str, worker: int, clock: int, bound: int | None) -> bool:
        """Ask to start a clock and wait for it; whether that clock is over."""
        self._check()
        state, actions = clocks.advance(getattr(self, f"_{name}"), clocks.Pull(worker, clock, bound))
        setattr(self, f"_{name}", state)
        self._note(name, actions)
        end = time.monotonic() + self.group.timeout_s
        while (name, worker) not in self._answers:
            self._turn.wait(SLICE_S)
            self._check()
            if time.monotonic() > end:
                behind = getattr(self, f"_{name}").behind()
                raise self.give_up(
                    f"rank {self.group.ranks[worker]} waited {self.group.timeout_s:g} s to start clock {clock}, for "
                    f"{self._ranks(behind)}, which has finished fewer than {state.done + 1} clocks"
                )
        return self._answers.pop((name, worker))

    def _note(self, name: str, actions: Sequence[clocks.Action]) -> None:
        """Let go whom the clocks let go, and keep the totals of the clocks that are done."""
        for action in actions:
            if isinstance(action, clocks.Answer):
                self._answers[name, action.worker] = action.late
                self._furthest = max(self._furthest, action.clock)
        for clock in sorted(c for c in self._open if c < self._clocks.done):
            self._totals = [*self._totals, Total(clock, *self._open.pop(clock))][-TOTALS:]
        self._turn.notify_all()

    def _answer(self, worker: int, late: bool) -> Answer:
        news = tuple(total for total in self._totals if total.clock >= self._told[worker])
        if news:
            self._told[worker] = news[-1].clock + 1
        deals = self._dealing.deals
        return Answer(late, self._clocks.done, self.store.version, len(deals), deals[-1], news)

    def _report(self, worker: int, request: Request) -> None:
        """How fast the worker was; perhaps the samples are dealt anew."""
        if self._leads and self._ahead and request.seconds > 0:
            with self._turn:
                said = deal.Report(self.workers.index(worker), request.samples, request.seconds, request.seen)
                self._dealing = deal.report(self._dealing, said, self._furthest + self._ahead)

    def _check(self) -> None:
        if self._failure is not None:
            if isinstance(self._failure, ShardwiseError):
                raise type(self._failure)(str(self._failure)) from self._failure
            raise CommError(f"{self._who()} failed: {self._failure}") from self._failure
        if self.group.aborted:
            raise CommError(
                f"{self._who()} stopped: its group '{self.group.getGroupDesc()}' is closed because "
                f"{self.group.why_aborted}."
            )

    def _who(self) -> str:
        return f"the parameter server on rank {self.group.ranks[self.group.rank()]}"

    def _ranks(self, workers: Sequence[int]) -> str:
        return "rank(s) " + ", ".join(str(self.group.ranks[worker]) for worker in workers)


class Wanted:
    """What a worker asks for: it has the pieces of `version`; of each table the rows `rows[t]`, or what has changed
    since `known[t]` where that is None."""

    def __init__(self, version: int, known: Sequence[int], rows: Sequence[Tensor | None]) -> None:
        self.version = version
        self.known = list(known)
        self.rows = list(rows)


def send_wanted(line: Line, wanted: Wanted) -> None:
    """Follows a PULL."""
    counts = [-1 if rows is None else len(rows) for rows in wanted.rows]
    line.send(torch.tensor([wanted.version, *wanted.known, *counts]), ROWS).work.wait()
    for rows in wanted.rows:
        if rows is not None and len(rows):
            line.send(rows, ROWS).work.wait()


def receive_wanted(line: Line, store: Store) -> Wanted:
    tables = len(store.tables)
    head = line.receive(torch.zeros(1 + 2 * tables, dtype=torch.int64), ROWS).tolist()
    rows: list[Tensor | None] = []
    for count in head[1 + tables :]:
        at = torch.empty(max(0, count), dtype=torch.int64)
        rows.append(None if count < 0 else line.receive(at, ROWS) if count else at)
    return Wanted(head[0], head[1 : 1 + tables], rows)


def pick_rows(store: Store, wanted: Wanted) -> list[tuple[Tensor, Tensor]]:
    """Of each table the indices and values of the rows to send, as copies."""
    found = []
    for table, changed, known, rows in zip(store.tables, store.changed, wanted.known, wanted.rows, strict=True):
        at = rows if rows is not None else torch.nonzero(changed > known).flatten()
        found.append((at, table[at]))
    return found
