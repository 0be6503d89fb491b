"""`local`: replicas take steps of their own and agree on parameters from time to time.

Local SGD (Stich 2019), post-local SGD (Lin et al. 2020), DiLoCo with an outer Nesterov optimizer (Douillard et al.
2023, algorithm 1), and streaming DiLoCo, where fragments of the parameters take turns (Douillard et al. 2025).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from shardwise.comm.codec import Codec
from shardwise.comm.collectives import average_all
from shardwise.comm.group import Group
from shardwise.comm.mesh import Axis
from shardwise.parallel.alone import Alone
from shardwise.parallel.fragments import Fragment, cut_evenly
from shardwise.parallel.moments import bounded_moments, carry_over, refuse_without_moments
from shardwise.parallel.reducer import Named, Reducer
from shardwise.parallel.synchronise import Kept, KeptByAll, Optimizers, Synchroniser
from shardwise.spec.sync import Sync


class LocalUpdates(Synchroniser):
    """Each replica steps on its own gradients; every `sync.every` steps their parameters meet.

    The first `sync.start` steps are exact. A fragment that meets is sent as the difference from where all were the last
    time, as `codec` rounds it, and arrives `sync.overlap` steps later, when it moves the replica by as much as it
    would have at once. While replicas step on their own, `sync.beta1` and `sync.beta2` bound Adam's betas.
    """

    def __init__(self, named: Callable[[], Named], axis: Axis, sync: Sync, codec: Codec | None = None) -> None:
        super().__init__(named, axis, sync)
        self._codec = codec
        self._named = named
        self._group = cast(Group, axis.group)
        self._size = axis.size
        self._sync = sync
        self._alone = Alone(named)
        self._steps = 0
        self._exact = False
        self._fragments: list[Fragment] = []
        if not sync.start:
            self._part()

    @property
    def own_totals(self) -> bool:
        return bool(self._fragments) and not self._exact

    @property
    def reducer(self) -> Reducer | Alone:
        return self._alone if self.own_totals else self._reducer

    def make_exact(self, exact: bool) -> None:
        if self._fragments and exact != self._exact:
            self._exact = exact
            if exact:
                self._meet()
            (self._reducer.reopen if exact else self._reducer.close)()

    def start_step(self, optimizers: Optimizers) -> bool:
        refuse_without_moments(optimizers, self._sync)
        return super().start_step(optimizers)

    def finish_step(self, optimizers: Optimizers, *, skipped: bool) -> float:
        if self._fragments and self._steps == self._sync.start:
            carry_over(optimizers, *self._betas())
        with bounded_moments(optimizers, *self._betas()):
            super().finish_step(optimizers, skipped=skipped)
        self._steps += 1
        began = time.perf_counter()
        if not self._fragments:
            if self._steps >= self._sync.start:
                self._part()
            return 0.0
        period = (self._steps - self._sync.start) % self._sync.every
        for number, fragment in enumerate(self._fragments):
            due = (number + 1) * self._sync.every // len(self._fragments) % self._sync.every
            if period == (due + self._sync.overlap) % self._sync.every:
                fragment.arrive()
            if period == due:
                fragment.send()
                if not self._sync.overlap:
                    fragment.arrive(at_once=True)
        return time.perf_counter() - began

    def _betas(self) -> tuple[float, float]:
        return (self._sync.beta1, self._sync.beta2) if self.own_totals else (0.0, 0.0)

    def _part(self) -> None:
        """From here on each replica is on its own; all have the same parameters now."""
        self._reducer.clear()
        self._reducer.close()
        trainable = [(name, p) for name, p in self._named() if p.requires_grad]
        count = self._sync.fragments if self._sync.method == "streaming" else 1
        outer = self._sync.method in ("diloco", "streaming")
        self._fragments = [
            Fragment(
                part,
                self._group,
                codec=self._codec,
                rate=self._sync.outer_lr if outer else 1.0,
                momentum=self._sync.outer_momentum if outer else 0.0,
            )
            for part in cut_evenly(trainable, count)
        ]

    def _meet(self) -> None:
        """All replicas go to their mean, and count from there."""
        for fragment in self._fragments:
            fragment.arrive()
        self.settle()
        for fragment in self._fragments:
            fragment.begin_here()

    # What all agree on: the mean of the replicas.

    @contextlib.contextmanager
    def consistent(self, optimizers: Optimizers = ()) -> Iterator[None]:
        before = [t.clone() for t in self._apart(optimizers)]
        self.settle(optimizers)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self._apart(optimizers), before, strict=True):
                    tensor.copy_(value)

    def settle(self, optimizers: Optimizers = ()) -> None:
        average_all(self._apart(optimizers), self._group)

    def _apart(self, optimizers: Optimizers) -> list[Tensor]:
        """The tensors in which replicas differ: trainable parameters and optimizer state."""
        if not self._fragments:
            return []
        parameters = [p.detach() for fragment in self._fragments for p in fragment.parameters]
        return parameters + list(_state(optimizers, [n for f in self._fragments for n in f.names], parameters).values())

    # The checkpoint.

    def keep(self, optimizers: Optimizers) -> Kept:
        for fragment in self._fragments:
            fragment.arrive()  # a checkpoint ends what is on its way
        rows: dict[str, Tensor] = {}
        common: dict[str, Tensor] = {}
        for fragment in self._fragments:
            rows |= fragment.rows()
            common |= fragment.common()
        names = [n for f in self._fragments for n in f.names]
        parameters = [p for f in self._fragments for p in f.parameters]
        rows |= _state(optimizers, names, parameters)
        return Kept(rows, common, {"steps": self._steps})

    def take(self, kept: KeptByAll, rank: int, optimizers: Optimizers) -> None:
        self._steps = int(kept.plain.get("steps", 0))
        if self._steps < self._sync.start:
            return
        self._part()
        names = [n for f in self._fragments for n in f.names]
        parameters = [p for f in self._fragments for p in f.parameters]
        for fragment in self._fragments:
            fragment.take_common(kept.common)
        if {len(rows) for rows in kept.rows.values()} != {self._size}:
            return  # other ranks: each begins at the mean, which the module and the optimizers have
        for fragment in self._fragments:
            fragment.take_rows(kept.rows, rank)
        with torch.no_grad():
            for name, tensor in _state(optimizers, names, parameters).items():
                if name in kept.rows:
                    tensor.copy_(kept.rows[name][rank])

    def close(self) -> None:
        super().close()
        self._alone.clear()


def _state(
    optimizers: Optimizers, names: Sequence[str], parameters: Sequence[nn.Parameter | Tensor]
) -> dict[str, Tensor]:
    """`optimizer/<parameter>/<key>` -> each floating-point tensor that the optimizers keep for these parameters."""
    found: dict[str, Tensor] = {}
    called = {p.data_ptr(): name for name, p in zip(names, parameters, strict=True)}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = called.get(parameter.data_ptr())
            for key, value in state.items() if name is not None else ():
                if isinstance(value, Tensor) and value.is_floating_point():
                    found[f"optimizer/{name}/{key}"] = value
    return found
