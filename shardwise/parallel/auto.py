"""`auto`: begin exact, measure, choose a word of synchronisation, and give it up when the loss leaves its band."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import msgspec
import torch

from shardwise import events
from shardwise.comm.collectives import largest
from shardwise.comm.group import Group
from shardwise.comm.mesh import Mesh
from shardwise.parallel.alone import Alone
from shardwise.parallel.loss_band import LossBand
from shardwise.parallel.moments import groups_with_moments
from shardwise.parallel.reducer import Named, Reducer
from shardwise.parallel.scatter import Scatter
from shardwise.parallel.synchronise import Kept, KeptByAll, Optimizers, StepTimes, Synchroniser
from shardwise.plan.auto_sync import Measured, choose
from shardwise.spec.sync import Sync

SETTLING, MEASURING = 5, 20  # exact steps: those that set things up, and those that are measured
FEW, LONG_S = 3, 5.0  # so few are measured where the first ones took so many seconds
PROBES = 5
PROBE_BYTES = 1 << 18


class AutoSync(Synchroniser):
    """Exact steps at first; then the word that `plan.auto_sync.choose` picks, with an exact step from time to time.

    When the loss of an exact step leaves the band (`LossBand`) on any rank, every step is exact from then on.
    """

    def __init__(
        self,
        named: Callable[[], Named],
        mesh: Mesh,
        sync: Sync,
        *,
        allow: Sequence[str],
        make: Callable[[Sync], Synchroniser],
    ) -> None:
        self._named = named
        self._mesh = mesh
        self._group = cast(Group, mesh.axis("batch").group)
        self._allow = tuple(allow)
        self._make = make
        self._exact = Sync(bucket_bytes=sync.bucket_bytes)
        self._chosen: Sync | None = None  # until enough was measured
        self._check_every = 0
        self._since_check = 0
        self._checking = False
        self._times: list[StepTimes] = []
        self._band = LossBand()
        self._moments = False
        self._inner = make(self._exact)

    @property
    def reducer(self) -> Reducer | Scatter | Alone:
        return self._inner.reducer

    @property
    def own_totals(self) -> bool:
        return self._inner.own_totals

    def finish_step(self, optimizers: Optimizers, *, skipped: bool) -> float:
        self._moments = bool(groups_with_moments(optimizers))
        return self._inner.finish_step(optimizers, skipped=skipped)

    def observe(self, times: StepTimes, loss: float) -> None:
        if self._chosen is None:
            self._times.append(times)
            if len(self._times) == SETTLING + MEASURING or (len(self._times) == SETTLING + FEW and self._slow()):
                self._choose()
        elif self._check_every:
            self._watch(loss)

    def _slow(self) -> bool:
        seconds = sum(t.work_s + t.wait_s for t in self._times)
        return largest([seconds], self._group, self._mesh.device)[0] > LONG_S

    def _choose(self) -> None:
        measured = self._measure()
        choice = choose(measured, self._allow, self._exact)
        if self._mesh.rank == 0:
            events.emit(
                "sync_chosen", **msgspec.to_builtins(choice.sync), check_every=choice.check_every, why=choice.why
            )
        self._use(choice.sync, choice.check_every)

    def _use(self, sync: Sync, check_every: int) -> None:
        self._chosen, self._check_every, self._since_check = sync, check_every, 0
        if sync != self._exact:
            self._inner.close()
            self._inner = self._make(sync)

    def _watch(self, loss: float) -> None:
        self._since_check += 1
        if self._checking:
            self._checking = False
            self._inner.make_exact(False)
            self._judge(loss)
        else:
            self._band.add(loss)
        if self._check_every and self._since_check >= self._check_every:
            self._since_check = 0
            self._checking = True
            self._inner.make_exact(True)

    def _judge(self, loss: float) -> None:
        """Every rank looks at its own band, and one is enough to give up."""
        why = self._band.left(loss)
        if not largest([1.0 if why else 0.0], self._group, self._mesh.device)[0]:
            return
        if why:
            events.emit("sync_given_up", rank=self._mesh.rank, why=why)
        self._inner.close()
        self._chosen, self._check_every = self._exact, 0
        self._inner = self._make(self._exact)

    def _measure(self) -> Measured:
        """The slowest rank's times and the link's, the same on all ranks."""
        work = statistics.median(t.work_s for t in self._times[SETTLING:])
        step = statistics.median(t.work_s + t.wait_s for t in self._times[SETTLING:])
        small, large = (self._probe(size) for size in (4, PROBE_BYTES))
        work, step, small, large = largest([work, step, small, large], self._group, self._mesh.device)
        elements = sum(p.numel() for _, p in self._named() if p.requires_grad)
        bandwidth = PROBE_BYTES / max(1e-9, large - small)
        return Measured(work, max(step, work), small, bandwidth, elements, self._group.size(), self._moments)

    def _probe(self, nbytes: int) -> float:
        """Seconds of an all-reduce of so many bytes: the median of a few."""
        tensor = torch.zeros(nbytes // 4, device=self._mesh.device)
        found = []
        for _ in range(PROBES):
            began = time.perf_counter()
            self._group.all_reduce(tensor).wait()
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    # What the chosen word does.

    @contextlib.contextmanager
    def consistent(self, optimizers: Optimizers = ()) -> Iterator[None]:
        with self._inner.consistent(optimizers):
            yield

    def settle(self, optimizers: Optimizers = ()) -> None:
        self._inner.settle(optimizers)

    def keep(self, optimizers: Optimizers) -> Kept:
        kept = self._inner.keep(optimizers)
        if self._chosen is None:
            return kept
        mine = {"sync": msgspec.to_builtins(self._chosen), "check_every": self._check_every}
        return kept._replace(plain={**kept.plain, "auto": mine})

    def take(self, kept: KeptByAll, rank: int, optimizers: Optimizers) -> None:
        """What was chosen stays chosen; the band begins anew."""
        if mine := kept.plain.get("auto"):
            self._use(msgspec.convert(mine["sync"], Sync), int(mine["check_every"]))
            self._inner.take(kept, rank, optimizers)

    def close(self) -> None:
        self._inner.close()
