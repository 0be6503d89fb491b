"""Which rank of a pipeline has what; parameters that several have: their gradients are summed, and counted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from shardwise.comm.group import Group
from shardwise.spec.layout import holds, stage_rank, stages_with
from shardwise.spec.plan import Plan


def places_of(name: str, plan: Plan) -> list[int]:
    """The places on the pipeline axis that hold a parameter or buffer."""
    return sorted({stage_rank(number, plan) for number in stages_with(f"model/{name}", plan)})


def kept(module: nn.Module, plan: Plan, rank: int) -> list[str]:
    """The names of the parameters and buffers that `rank` has under the plan; all of them without a pipeline."""
    named = [*(name for name, _ in module.named_parameters()), *(name for name, _ in module.named_buffers())]
    return [name for name in named if holds(f"model/{name}", plan, rank)]


class Ties:
    """The tied parameters of a module; `names` -> the places that hold each, the first of which adds them up."""

    def __init__(self, module: nn.Module, plan: Plan, group: Group) -> None:
        self._group, self._plan = group, plan
        self._here = group.rank()
        every = {name: places_of(name, plan) for name, _ in module.named_parameters()}
        self.names = {name: places for name, places in every.items() if len(places) > 1}

    @property
    def elsewhere(self) -> frozenset[str]:
        """Those that count in another rank's norm."""
        return frozenset(name for name, places in self.names.items() if places[0] != self._here)

    def spread(self, module: nn.Module) -> None:
        """Every holder of a tied parameter or shared buffer takes the first one's values. Collective."""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            first, *others = places_of(name, self._plan)
            if not others or self._here not in (first, *others):
                continue
            dense = tensor.detach().contiguous()
            if self._here == first:
                for work in [self._group.send([dense], place) for place in others]:
                    work.wait()
            else:
                self._group.recv([dense], first).wait()
                tensor.detach().copy_(dense)

    def sum(self, named: Mapping[str, nn.Parameter], zero: Callable[[str], None]) -> None:
        """Every holder's gradient becomes the sum of all holders'; one that no holder has stays None. `zero` gives a
        parameter a gradient where it has none. Collective."""
        trained = [name for name in self.names if name in named and named[name].requires_grad]
        used = self._used(named)
        for name in trained:
            places = self.names[name]
            if used[name] and self._here in places:
                if named[name].grad is None:
                    zero(name)
                grad = named[name].grad
                assert grad is not None
                self._exchange(grad, places)

    def _used(self, named: Mapping[str, nn.Parameter]) -> dict[str, bool]:
        """Which of them has a gradient anywhere."""
        if not self.names:
            return {}
        flags = [float(name in named and named[name].grad is not None) for name in self.names]
        device = next(iter(named.values())).device if named else torch.device("cpu")
        row = torch.tensor(flags, device=device)
        self._group.all_reduce(row).wait()
        return {name: bool(count) for name, count in zip(self.names, row.tolist(), strict=True)}

    def _exchange(self, grad: Tensor, places: list[int]) -> None:
        """In the order of the places, so that all have the same bits."""
        first, others = places[0], places[1:]
        dense = grad.contiguous()
        if self._here != first:
            self._group.send([dense], first).wait()
            self._group.recv([dense], first).wait()
        else:
            came = torch.empty_like(dense)
            for place in others:
                self._group.recv([came], place).wait()
                dense.add_(came)
            for work in [self._group.send([dense], place) for place in others]:
                work.wait()
        if dense is not grad:
            grad.copy_(dense)
