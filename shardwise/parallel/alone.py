"""One rank without exact sums: gradients stay where autograd puts them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from shardwise.parallel import statistics
from shardwise.parallel.clip import norm_of
from shardwise.parallel.reducer import Named
from shardwise.parallel.statistics import Totals


class Alone:
    """The interface of `Reducer` where there is nobody to reduce with."""

    def __init__(self, named: Callable[[], Named]) -> None:
        self._named = named
        self._parameters: dict[str, nn.Parameter] = {}
        self._reports: list[Tensor] = []

    def begin(self) -> None:
        self._parameters = dict(self._named())
        self.clear()
        self._reports = []

    def begin_micro(self, *, shard: int | None = None, last: bool) -> None:
        return None

    def report(self, slot: int, loss_sum: Tensor, weight: Tensor) -> None:
        self._reports.append(statistics.pair(loss_sum, weight))

    def collect(self, names: Collection[str]) -> None:
        return None

    def finish(self, *, mean: bool = False) -> tuple[Totals, float]:
        pair = torch.stack(self._reports).sum(0).tolist() if self._reports else [0.0, 0.0]
        return statistics.total([(pair[0], pair[1])], tree=False), 0.0

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        yield

    def norm(self, without: Collection[str] | None = None) -> float:
        return norm_of([p.grad for n, p in self._parameters.items() if p.grad is not None and n not in (without or ())])

    def zero(self, name: str) -> None:
        self._parameters[name].grad = torch.zeros_like(self._parameters[name])

    def scale(self, factor: float) -> None:
        if grads := [p.grad for p in self._parameters.values() if p.grad is not None]:
            torch._foreach_mul_(grads, factor)

    def clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def close(self) -> None:
        return None

    def reopen(self) -> None:
        return None
