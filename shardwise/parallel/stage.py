"""`Stage`: the parts of a module between two cuts, run by the module's own `forward`.

Every stage calls `forward` of the whole module. What comes before its own calls hands on what was received, or zeros
that nobody reads; after its last call the run ends, and what later stages need leaves. So masks, positions and keyword
arguments are made by the module's own code on each stage, and nothing has to be lifted out of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from shardwise.errors import JobError
from shardwise.models.cuts import Part
from shardwise.models.dataflow import Dataflow, Forward, Passed, Plain, Value, leaves_of
from shardwise.models.inputs import call
from shardwise.parallel.tensor.handed import brought_together


class _Cut(BaseException):
    """Ends the module's forward after the stage's last call; no `except Exception` of the user's holds it."""


class Stage:
    """`module` cut down, in place, to the parameters called `kept`; the others keep their shapes and take no memory.

    `names` are the modules whose calls count, as a dataflow has them.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], kept: Collection[str], device: torch.device | None = None
    ) -> None:
        self.module = module
        self._device = device or torch.device("cpu")
        self._flow: Dataflow | None = None
        self._part: Part | None = None
        self._calls = 0
        self._counting = False  # in `run`, and in none of the calls
        self._values: dict[Value, Tensor] = {}
        self._state: Tensor | None = None
        for name, parameter in module.named_parameters():
            if name not in kept:
                parameter.data = stand_in(parameter.shape, parameter.dtype, parameter.device)
        self._inner = {name: module.get_submodule(name) for name in names}
        self._replaced: dict[str, Any] = {}

    def open(self) -> None:
        """Count the calls of the module's parts from now on."""
        self._replaced = {name: vars(inner).get("forward") for name, inner in self._inner.items()}
        for name, inner in self._inner.items():
            inner.forward = partial(self._visit, name, inner.forward)

    def run(
        self, flow: Dataflow, part: Part, batch: Any, received: Sequence[Tensor], *, forward: Forward | None = None
    ) -> Any:
        """The module's output where `part` is the last one of the flow, else the tensors of its `sends`, contiguous.

        `received` has those of its `receives`. Where the flow draws random numbers the state of torch's generators
        comes and goes behind them, so that they are what one process would draw. Raises JobError where the module
        calls its parts in another order.
        """
        self._flow, self._part = flow, part
        self._counting = True
        self._calls = 0
        follows = flow.random and part.first > 0
        self._state = received[-1] if follows else None
        values = received[:-1] if follows else received
        self._values = dict(zip(part.receives, values, strict=True))
        try:
            return call(self.module, batch, forward)
        except _Cut:
            leaving = tuple(_leaving(brought_together(self._values[v]), received) for v in part.sends)
            return (*leaving, generator_state(self._device)) if flow.random else leaving
        finally:
            self._values = {}
            self._counting = False

    def close(self) -> None:
        """The module's parts run as they did before; what other stages hold stays away."""
        for name, replaced in self._replaced.items():
            del self._inner[name].forward
            if replaced is not None:  # the user's own, on this one object
                self._inner[name].forward = replaced
        self._replaced = {}

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """In this block the module is as the user made it."""
        opened = bool(self._replaced)
        self.close()
        try:
            yield
        finally:
            if opened:
                self.open()

    def _visit(self, name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._counting:  # a part of a part, or one that backward computes again
            return own(*args, **kwargs)
        assert self._flow is not None
        assert self._part is not None
        number = self._calls
        self._calls += 1
        if number >= len(self._flow.calls) or self._flow.calls[number].name != name:
            raise JobError(
                f"'{name}' is call {number} of this batch, which it was not when the model was cut. The order in which "
                "forward calls its parts must not depend on chance or on numbers."
            )
        if number < self._part.first:
            if number + 1 == self._part.first and self._state is not None:
                set_generators(self._state)
            return self._stand_in(number, args, kwargs)
        self._counting = False
        try:
            output = own(*args, **kwargs)
        finally:
            self._counting = True
        for index, leaf in enumerate(leaves_of(output)):
            if (number, index) in self._part.sends:
                self._values[number, index] = self._kept((number, index), leaf)
        if number == self._part.last and number + 1 < len(self._flow.calls):
            raise _Cut
        return output

    def _stand_in(self, number: int, args: Any, kwargs: Any) -> Any:
        """What an earlier stage's call returned, as far as anything here depends on it."""
        assert self._flow is not None
        one = self._flow.calls[number]
        given = leaves_of((args, kwargs)) if any(isinstance(leaf, Passed) for leaf in one.leaves) else ()
        leaves: list[Any] = []
        for index, leaf in enumerate(one.leaves):
            if isinstance(leaf, Passed):
                leaves.append(given[leaf.argument])
            elif isinstance(leaf, Plain):
                leaves.append(leaf.value)
            else:
                value = self._values.get((number, index))
                if value is None:
                    value = stand_in(torch.Size(leaf.shape), leaf.dtype, leaf.device)
                leaves.append(self._kept((number, index), value))
        return tree_unflatten(leaves, one.tree)

    def _kept(self, value: Value, tensor: Tensor) -> Tensor:
        """A copy of what will be written into: what goes on to later stages is what the call returned."""
        assert self._flow is not None
        return tensor.clone() if value in self._flow.written else tensor


def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def generator_state(device: torch.device) -> Tensor:
    """The state of torch's generators, of the CPU and of `device`, as bytes there."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states).to(device)


def set_generators(state: Tensor) -> None:
    """The inverse of `generator_state`."""
    device, bytes_of_it = state.device, state.cpu()
    size = torch.get_rng_state().numel()
    torch.set_rng_state(bytes_of_it[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(bytes_of_it[size:].clone(), device)


def _leaving(value: Tensor, received: Sequence[Tensor]) -> Tensor:
    """Contiguous, and a tensor of its own: backward begins with it, and schedules detach it in place, which no view
    allows."""
    if value._is_view() or not value.is_contiguous() or any(value is each for each in received):
        return value.clone(memory_format=torch.contiguous_format)
    return value
