"""The worker's side of a parameter server: clocks are started, gradients pushed and parameters pulled, by shard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardwise.comm.deal import Deal
from shardwise.comm.param_flats import Flats
from shardwise.comm.param_peers import Peer, Rows
from shardwise.comm.param_serve import Wanted
from shardwise.comm.param_store import Push
from shardwise.comm.param_wire import Answer, Kind, Request, Total


class Worker:
    """One worker's clock, its servers, and what they told it. `peers[0]` is the server that leads.

    `clock` is the next one to start. `totals` collects the losses of finished clocks until somebody takes them;
    `deals` are all that were made so far.
    """

    def __init__(self, flats: Flats, peers: Sequence[Peer], clock: int, workers: int, *, backup: bool) -> None:
        self.flats = flats
        self.clock = clock
        self.totals: list[Total] = []
        self.deals = [Deal(clock, (1 / workers,) * workers)]
        self._peers = list(peers)
        self._backup = backup
        self._versions = [0] * len(peers)
        self._known = [[0] * len(flats.tables) for _ in peers]
        self._first = clock
        self._samples = 0
        self._began = 0.0  # when the last clock was let start
        self._busy = 0.0  # seconds from then until this worker asked for the next

    def start(self, rows: Mapping[str, Tensor] | None = None) -> bool:
        """Wait until the next clock may start and pull the parameters; False when it is over: then it is skipped.

        `rows`: of these tables only these rows are pulled, else all that have changed.
        """
        self._stop_watch()
        if self._backup and self._hear(self._peers[0].start(self._request())).late:
            for peer in self._peers:
                peer.skip(self.clock)
            self.clock += 1
            self._began = 0.0
            return False
        self._pull(self._request(), rows or {})
        self._began, self._busy, self._samples = time.perf_counter(), 0.0, 0
        return True

    def drain(self) -> None:
        """Wait until all gradients of the clocks before the next one are in the parameters, and pull them."""
        self._stop_watch()
        self._pull(self._request()._replace(bound=0), {})
        self._began = self._busy = 0.0

    def begin(self) -> None:
        """Pieces of the clock's gradient may be sent, while the others are computed; not with backup workers."""
        for peer in self._peers:
            peer.begin(self.clock)

    def send(self, flat: int) -> None:
        """Push a flat of gradients that is complete; it must not change before `finish`."""
        for server, peer in enumerate(self._peers):
            peer.piece(flat, self.flats.piece(self.flats.grads[flat], flat, server))

    def in_time(self) -> bool:
        """With backup workers: whether the gradient that is ready counts. If not the clock is given up."""
        if not self._hear(self._peers[0].count(self.clock)).late:
            return True
        for peer in self._peers:
            peer.skip(self.clock)
        self.clock += 1
        return False

    def finish(self, said: Push, samples: int, rows: Mapping[str, Rows]) -> None:
        """The clock's gradient is whole: `rows` of the tables, counted in the whole table, coalesced."""
        for server, peer in enumerate(self._peers):
            peer.end(said, [self._of_server(table.name, rows, server) for table in self.flats.shards.tables])
        self._samples = samples
        self.clock += 1

    def nothing(self, samples: int) -> None:
        """The clock has no gradient from this worker."""
        for peer in self._peers:
            peer.nothing(self.clock)
        self._samples = samples
        self.clock += 1

    def leave(self) -> None:
        """Tell the servers that no more comes from here."""
        for peer in self._peers:
            peer.leave()

    def _stop_watch(self) -> None:
        """A worker's first clock is no measure of its speed."""
        if self._began and self.clock > self._first + 1:
            self._busy = time.perf_counter() - self._began

    def _pull(self, request: Request, rows: Mapping[str, Tensor]) -> None:
        asked = []
        for server, peer in enumerate(self._peers):
            wanted = self._wanted(server, rows)
            asked.append(wanted)
            peer.ask(request, wanted)
        for server, peer in enumerate(self._peers):
            pieces = [self.flats.piece(values, i, server) for i, values in enumerate(self.flats.values)]
            answer = peer.pulled(pieces, self.flats.rows(server))
            if server == 0:
                self._hear(answer)
            self._versions[server] = answer.version
            for number, at in enumerate(asked[server].rows):
                if at is None:
                    self._known[server][number] = answer.version

    def _request(self) -> Request:
        return Request(Kind.PULL, self.clock, -1, self._samples, self._busy, len(self.deals) - 1)

    def _hear(self, answer: Answer) -> Answer:
        """News of the server that leads."""
        self.totals += answer.totals
        if answer.deals > len(self.deals):
            self.deals.append(answer.deal)
        return answer

    def _wanted(self, server: int, rows: Mapping[str, Tensor]) -> Wanted:
        mine: list[Tensor | None] = []
        for table in self.flats.shards.tables:
            node = table.rows[server]
            at = rows.get(table.name)
            mine.append(None if at is None else at[(at >= node.start) & (at < node.stop)].unique() - node.start)
        return Wanted(self._versions[server], self._known[server], mine)

    def _of_server(self, name: str, rows: Mapping[str, Rows], server: int) -> Rows:
        if name not in rows:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        at, values = rows[name]
        table = next(table for table in self.flats.shards.tables if table.name == name)
        own = (at >= table.rows[server].start) & (at < table.rows[server].stop)
        return at[own] - table.rows[server].start, values[own].contiguous()
