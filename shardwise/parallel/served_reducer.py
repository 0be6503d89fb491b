"""Gradients that go to a parameter server: the buckets of a `Reducer` are the server's flats."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from shardwise.comm.mesh import Axis
from shardwise.comm.param_flats import Flats
from shardwise.parallel import statistics
from shardwise.parallel.buckets import Bucket
from shardwise.parallel.clip import norm_of
from shardwise.parallel.reducer import Named, Reducer
from shardwise.parallel.statistics import Totals

Settle = Callable[[Tensor], tuple[Tensor, float]]


class ServedReducer(Reducer):
    """Calls `send(i)` as soon as flat i is complete, while backward goes on; gradients stay in the flats.

    With `settle` (given a float64 row; returns its sum over the ranks, and the norm of the summed gradients) totals and
    norm are those of all ranks; without, this rank's own. Nothing is multiplied: `factor` is what is to be applied.
    """

    def __init__(
        self,
        flats: Flats,
        named: Callable[[], Named],
        axis: Axis,
        send: Callable[[int], object],
        settle: Settle | None = None,
    ) -> None:
        self._flats = flats
        self._leave = send
        self._settle = settle
        self._norm = 0.0
        self.factor = 1.0
        self.own = Totals(0.0, 0.0, [])
        self.used: set[str] = set()
        self.empty = True
        super().__init__(named, axis, bucket_bytes=1)

    def begin(self) -> None:
        self.factor = 1.0
        super().begin()

    def finish(self, *, mean: bool = False) -> tuple[Totals, float]:
        assert not mean, "parameters are updated by servers, which a loop of one's own would have to ask for"
        self.empty = not self._begun
        if self._settle is not None or not self.empty:
            for bucket in self._buckets[self._next :]:
                bucket.missing = 0
            self._advance()
        size = self._axis.size
        row = torch.zeros(2 * size + len(self._names), dtype=torch.float64, device=self._device())
        for slot, pair in self._reports.items():
            row[2 * slot : 2 * slot + 2] = pair
        row[2 * size :] = torch.tensor(self._used, dtype=torch.float64)
        if self._settle is not None:
            row, self._norm = self._settle(row)
        else:
            self._norm = math.hypot(*(norm_of([grads]) for grads in self._flats.grads)) if not self.empty else 0.0
        values = row.tolist()
        self.used = {name for name, count in zip(self._names, values[2 * size :], strict=True) if count}
        self._reset()
        self.own = statistics.total(
            list(zip(values[: 2 * size : 2], values[1 : 2 * size : 2], strict=True)), tree=False
        )
        return self.own, 0.0

    def norm(self, without: Collection[str] | None = None) -> float:
        return self._norm

    def scale(self, factor: float) -> None:
        self.factor *= factor

    def _device(self) -> torch.device:
        return self._flats.grads[0].device if self._flats.grads else torch.device("cpu")

    def _lay_out(self, order: Sequence[int]) -> None:
        """The order is the flats' own, whatever order gradients arrive in."""
        self._arrivals = None
        number_of = {name: number for number, name in enumerate(self._names)}
        self._buckets = []
        for flat, grads in zip(self._flats.shards.flats, self._flats.grads, strict=True):
            grads.zero_()  # what was frozen since has no gradient any more
            placed = [p for p in flat.placed if p.name in number_of]
            members = [number_of[p.name] for p in placed]
            bucket = Bucket(
                [self._parameters[member] for member in members],
                members,
                0,
                lambda numel, dtype, device, grads=grads: grads,  # type: ignore[misc]
                grads,
                ([p.offset for p in placed], grads.numel()),
            )
            self._buckets.append(bucket)
            for position, member in enumerate(members):
                self._place[member] = (bucket, position)

    def _send(self, bucket: Bucket, *, last: bool) -> None:
        self._complete(bucket)
        self._leave(self._next - 1)
