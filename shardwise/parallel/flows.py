"""How values flow through a module for batches of each shape, seen without the numbers of what other stages hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.errors import JobError, ShardwiseError
from shardwise.models.cuts import Part, held, parts
from shardwise.models.dataflow import Dataflow, Forward, Loss, dataflow
from shardwise.models.profile import quiet
from shardwise.spec.plan import Plan

MOST = 256  # routes that are kept
Copy = Callable[[Tensor], Tensor]


class Route(NamedTuple):
    """The flow of batches of one shape, and what each stage does in it."""

    flow: Dataflow
    parts: tuple[Part, ...]


class Flows:
    """Routes of a module that is cut as `plan` says, each found once, on a copy of the module without its numbers.

    In the block of `bare()` the module is as the user made it. `numbers` are the stages of this rank, and `kept` is
    what it has of the module; `shapes` are those of the whole parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        bare: Callable[[], AbstractContextManager[Any]],
        *,
        numbers: Sequence[int],
        kept: Collection[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._module = module
        self._shapes = shapes
        self._blocks = plan.blocks
        self._firsts = [stage.first for stage in plan.stages]
        self._bare = bare
        self._numbers, self._kept = tuple(numbers), kept
        self._dropouts = [part for part in module.modules() if isinstance(part, _DropoutNd)]
        self._known: dict[Any, Route] = {}

    def mode(self) -> Any:
        """What of the module decides how values flow: alike for all batches of a step."""
        trained = tuple(p.requires_grad for p in self._module.parameters())
        chances = tuple(part.p for part in self._dropouts)
        return self._module.training, torch.is_grad_enabled(), trained, chances

    def route(self, batch: Any, mode: Any, *, forward: Forward | None = None, loss: Loss | None = None) -> Route:
        """The route of `batch` in the module's mode of now; without `loss` all of the output is wanted.

        Raises JobError where the module cannot be cut with such a batch, calls other parts than the plan has, or needs
        a parameter that this rank does not have.
        """
        leaves, tree = tree_flatten(batch)
        key = (str(tree), tuple(_kind(leaf) for leaf in leaves), mode, loss is None)
        if key not in self._known:
            if len(self._known) == MOST:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._look(batch, forward, loss)
        return self._known[key]

    def _look(self, batch: Any, forward: Forward | None, loss: Loss | None) -> Route:
        devices = {p.device for p in self._module.parameters() if p.is_cuda}
        with torch.random.fork_rng(devices=list(devices)), quiet():
            try:
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                given = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)
                with mode:
                    twin = self._twin(_empty, _empty)
                    flow = dataflow(twin, given, forward=forward, loss=loss)
            except ShardwiseError:
                raise
            except Exception:  # its code looks at numbers: run it on this batch, with zeros for what is elsewhere
                twin = self._twin(torch.detach, torch.clone)
                flow = dataflow(twin, batch, forward=forward, loss=loss)
        called = tuple(one.name for one in flow.calls)
        if called != self._blocks:
            number, here, there = _first_difference(called, self._blocks)
            raise JobError(
                f"call {number} of the model with this batch is of '{here}', and was of '{there}' when the plan was "
                "made. Let forward call its parts in one order for every batch."
            )
        found = Route(flow, tuple(parts(flow, self._firsts)))
        self._refuse_missing(twin, found)
        return found

    def _twin(self, parameter: Copy, buffer: Copy) -> nn.Module:
        """A copy with other tensors: whatever its forward leaves in it, the module itself stays as it is."""
        memo: dict[int, Any] = {}
        for name, p in self._module.named_parameters():
            # of what is cut there are zeros, as of what is elsewhere
            data = p.data if p.shape == self._shapes[name] else _zeros(p, self._shapes[name])
            memo[id(p)] = nn.Parameter(parameter(data), requires_grad=p.requires_grad)
        for b in self._module.buffers():
            memo[id(b)] = buffer(b)
        with self._bare():
            return copy.deepcopy(self._module, memo)

    def _refuse_missing(self, twin: nn.Module, route: Route) -> None:
        for number in self._numbers:
            missing = [name for name in held(twin, route.flow, route.parts[number]) if name not in self._kept]
            if missing:
                raise JobError(
                    f"with this batch stage {number} needs '{missing[0]}', which is in another stage: the model did "
                    "not use it there when the plan was made. Let forward use the same parameters for every batch, in "
                    "training and in evaluation."
                )


def _kind(leaf: Any) -> Any:
    """What of a leaf may decide how values flow."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return leaf if isinstance(leaf, int | float | bool | None) else type(leaf)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _zeros(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(tuple(shape))


def _first_difference(here: Sequence[str], there: Sequence[str]) -> tuple[int, str, str]:
    pairs = enumerate(zip_longest(here, there, fillvalue="nothing"))
    return next((number, a, b) for number, (a, b) in pairs if a != b)
