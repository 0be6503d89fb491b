"""`run_ranks`: a function on n forked processes with a loopback store between them; a hang is a failure."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo  # optimizers import it; once here instead of in every forked rank
import torch.distributed as dist

from shardwise.comm.group import Group
from shardwise.comm.mesh import Mesh, connect
from shardwise.comm.store import listen, open_store
from shardwise.spec.plan import Plan

GOOD, BAD = b"+", b"-"
PATIENCE_S = 2.0


class Rank(NamedTuple):
    """What the function gets first: who it is, and the store where it meets the others (None when alone)."""

    rank: int
    world: int
    store: dist.Store | None

    def mesh(self, plan: Plan | None = None, **settings: Any) -> Mesh:
        """Connect as `plan` says (all ranks on the data axis by default)."""
        settings = {"timeout_s": 30, **settings}
        return connect(plan or Plan(data=self.world), rank=self.rank, world=self.world, store=self.store, **settings)


class RankFailed(AssertionError):
    """A rank raised or died; the text is its traceback."""


def run_ranks(
    n: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60,
    may_die: tuple[int, ...] = (),
    patience_s: float = PATIENCE_S,
) -> list[Any]:
    """Call `fn(Rank, *args)` on `n` forked ranks with one torch thread each; their results in rank order.

    Raises RankFailed with the first rank's traceback, or when a rank ends without a result (unless it is in
    `may_die`: then its result is None), or after `timeout_s` seconds. No rank outlives the call. Rank 0, which
    serves the store, waits at most `patience_s` seconds for the others to finish, but for none in `may_die`.
    """
    listener = listen()
    pids: list[int] = []
    pipes: list[int] = []
    for rank in range(n):
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(rank, n, listener, writer, fn, args, patience_s, may_die)
        os.close(writer)
        pids.append(pid)
        pipes.append(reader)
    listener.close()
    try:
        raw = _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for reader in pipes:
            os.close(reader)
    return _results(raw, timeout_s, may_die)


def _child(
    rank: int,
    n: int,
    listener: Any,
    writer: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    patience_s: float,
    may_die: tuple[int, ...],
) -> None:
    """Never returns: a forked rank must not run pytest's own end."""
    try:
        torch.set_num_threads(1)
        port = listener.getsockname()[1]
        descriptor = os.dup(listener.fileno()) if rank == 0 else None
        listener.close()
        store = open_store(descriptor, port, rank, n, 30) if n > 1 else None
        answer = (True, fn(Rank(rank, n, store), *args))
        if isinstance(dist.group.WORLD, Group):
            dist.group.WORLD.shutdown()  # a rank that ends without it has died, for the others
        if store is not None:
            _leave_together(store, rank, set(range(1, n)) - set(may_die), patience_s)
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        raw = pickle.dumps(answer)
    except Exception:
        answer = (False, traceback.format_exc())
        raw = pickle.dumps(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    view = memoryview((GOOD if answer[0] else BAD) + raw)
    while view:
        view = view[os.write(writer, view) :]
    os._exit(0)


def _leave_together(store: dist.Store, rank: int, others: set[int], patience_s: float) -> None:
    """The rank that serves the store leaves last, or `others` would see it end; the dead are not waited for long."""
    if rank != 0:
        with contextlib.suppress(dist.DistNetworkError):  # the rank that serves it was killed
            store.set(f"tests/finished/{rank}", "")  # unlike add, this waits for no answer
        return
    end = time.monotonic() + patience_s
    while others and time.monotonic() < end and not store.check([f"tests/finished/{r}" for r in others]):
        time.sleep(0.005)


def _collect(pipes: list[int], deadline: float) -> list[bytes | None]:
    """What each rank wrote, b"" for a rank that ended without a word, None for one that is still running.

    Once a rank has failed the others have PATIENCE_S more: they may be waiting for it.
    """
    raw = {reader: b"" for reader in pipes}
    waiting = set(pipes)
    while waiting and time.monotonic() < deadline:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        for reader in ready:
            piece = os.read(reader, 1 << 20)
            raw[reader] += piece
            if not piece:
                waiting.discard(reader)
                if raw[reader].startswith(BAD):
                    deadline = min(deadline, time.monotonic() + PATIENCE_S)
    return [None if reader in waiting else raw[reader] for reader in pipes]


def _results(raw: list[bytes | None], timeout_s: float, may_die: tuple[int, ...]) -> list[Any]:
    answers = [pickle.loads(r[1:]) if r else None for r in raw]
    failed = [(rank, a[1]) for rank, a in enumerate(answers) if a is not None and not a[0]]
    if failed:
        raise RankFailed("\n".join(f"rank {rank} of {len(raw)}:\n{text}" for rank, text in failed))
    late = [rank for rank, r in enumerate(raw) if r is None]
    if late:
        raise RankFailed(f"rank(s) {late} of {len(raw)} did not finish in {timeout_s:g} s")
    dead = [rank for rank, a in enumerate(answers) if a is None and rank not in may_die]
    if dead:
        raise RankFailed(f"rank(s) {dead} of {len(raw)} ended without a result")
    return [a[1] if a is not None else None for a in answers]
