"""How values flow through a module for batches of each shape, seen without the numbers of what other stages hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.errors import JobError, ShardwiseError
from shardwise.models.cuts import Part, parts
from shardwise.models.dataflow import Dataflow, Forward, Loss, dataflow
from shardwise.spec.plan import Plan

Look = Callable[[Any], Dataflow]
Copy = Callable[[Tensor], Tensor]


class Route(NamedTuple):
    """The flow of batches of one shape, and what each stage does in it."""

    flow: Dataflow
    parts: tuple[Part, ...]


class Flows:
    """Routes of a module that is cut as `plan` says, each found once. `quiet` is around a run that must tell nobody."""

    def __init__(self, module: nn.Module, plan: Plan, quiet: Callable[[], AbstractContextManager[Any]]) -> None:
        self._module = module
        self._blocks = plan.blocks
        self._firsts = [stage.first for stage in plan.stages]
        self._quiet = quiet
        self._known: dict[Any, Route] = {}

    def route(self, batch: Any, *, forward: Forward | None = None, loss: Loss | None = None) -> Route:
        """The route of `batch` in the module's mode of now; without `loss` all of the output is wanted.

        Raises JobError where the module cannot be cut with such a batch, or calls other parts than the plan has.
        """
        leaves, tree = tree_flatten(batch)
        shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        trained = tuple(p.requires_grad for p in self._module.parameters())
        key = (str(tree), shapes, self._module.training, torch.is_grad_enabled(), trained, loss is None)
        if key not in self._known:
            self._known[key] = self._look(batch, forward, loss)
        return self._known[key]

    def _look(self, batch: Any, forward: Forward | None, loss: Loss | None) -> Route:
        def look(given: Any) -> Dataflow:
            return dataflow(self._module, given, forward=forward, loss=loss)

        with torch.random.fork_rng(), self._quiet():
            try:
                flow = self._on_fake(look, batch)
            except ShardwiseError:
                raise
            except Exception:  # its code looks at numbers: run it on this batch, with zeros for what is elsewhere
                flow = self._on_zeros(look, batch)
        called = tuple(one.name for one in flow.calls)
        if called != self._blocks:
            number, here, there = _first_difference(called, self._blocks)
            raise JobError(
                f"call {number} of the model with this batch is of '{here}', and was of '{there}' when the plan was "
                "made. Let forward call its parts in one order for every batch."
            )
        return Route(flow, tuple(parts(flow, self._firsts)))

    def _on_fake(self, look: Look, batch: Any) -> Dataflow:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, batch)
        with mode:
            return self._on(look, given, _empty, _empty)

    def _on_zeros(self, look: Look, batch: Any) -> Dataflow:
        return self._on(look, batch, torch.detach, torch.clone)

    def _on(self, look: Look, batch: Any, parameter: Copy, buffer: Copy) -> Dataflow:
        """`look(batch)` with copies in the place of the module's own tensors, so that none of those changes."""
        frame = _Frame(self._module, look)
        tensors = {name: parameter(p).requires_grad_(p.requires_grad) for name, p in frame.named_parameters()}
        tensors |= {name: buffer(b) for name, b in frame.named_buffers()}
        found: Dataflow = torch.func.functional_call(frame, tensors, (batch,), tie_weights=True)
        return found


class _Frame(nn.Module):
    """`functional_call` calls this, whose parameters are those of the module inside."""

    def __init__(self, inside: nn.Module, look: Look) -> None:
        super().__init__()
        self.inside = inside
        self._look = look
        self.training = inside.training

    def forward(self, batch: Any) -> Dataflow:
        return self._look(batch)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _first_difference(here: Sequence[str], there: Sequence[str]) -> tuple[int, str, str]:
    pairs = enumerate(zip_longest(here, there, fillvalue="nothing"))
    return next((number, a, b) for number, (a, b) in pairs if a != b)
