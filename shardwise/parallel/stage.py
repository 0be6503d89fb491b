"""`Stage`: the part of a module between two cuts, run by the module's own `forward`.

Every stage calls `forward` of the whole module. What comes before its own calls hands on what was received, or zeros
that nobody reads; after its last call the run ends, and what later stages need leaves. So masks, positions and keyword
arguments are made by the module's own code on each stage, and nothing has to be lifted out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from shardwise.errors import JobError
from shardwise.models.inputs import call
from shardwise.parallel.dataflow import Dataflow, Forward, Needs, Passed, Plain, Value, leaves_of


class Part(NamedTuple):
    """Calls `first..last` (inclusive) of a dataflow: the values that come in, those that go on, and the parameters and
    buffers outside of calls that it reads."""

    first: int
    last: int
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    tensors: frozenset[str]


class _Cut(BaseException):
    """Ends the module's forward after the stage's last call; no `except Exception` of the user's holds it."""


def parts(flow: Dataflow, firsts: Sequence[int]) -> list[Part]:
    """The stages that begin with these calls, in ascending order, the first of them 0.

    A value that several later stages need goes through all between. Raises JobError for more stages than calls.
    """
    count = len(flow.calls)
    if list(firsts) != sorted(set(firsts)) or not firsts or firsts[0] != 0 or firsts[-1] >= count:
        raise JobError(
            f"the model cannot be cut before its calls {list(firsts)}: it has {count}, each stage needs one of its "
            "own, and the first begins with call 0. Choose fewer stages."
        )
    ends = [*firsts[1:], count]
    needs = [_needed(flow, first, end) for first, end in zip(firsts, ends, strict=True)]
    return [
        Part(first, end - 1, _live(needs[number:], first), _live(needs[number + 1 :], end), needs[number].tensors)
        for number, (first, end) in enumerate(zip(firsts, ends, strict=True))
    ]


def _needed(flow: Dataflow, first: int, end: int) -> Needs:
    found = flow.loss if end == len(flow.calls) else Needs()
    for one in flow.calls[first:end]:
        found |= one.needs
    return found


def _live(needs: Sequence[Needs], before: int) -> tuple[Value, ...]:
    """What calls before `before` return and one of these needs."""
    return tuple(sorted({value for each in needs for value in each.values if value[0] < before}))


def held(module: nn.Module, flow: Dataflow, part: Part) -> list[str]:
    """The parameters that the stage computes with; several stages hold a tied one."""
    inside = tuple(f"{one.name}." for one in flow.calls[part.first : part.last + 1])
    everywhere = module.named_parameters(remove_duplicate=False)
    mine = {id(p) for name, p in everywhere if name.startswith(inside) or name in part.tensors}
    return [name for name, p in module.named_parameters() if id(p) in mine]


class Stage:
    """`module` cut down, in place, to what `parts` of it run, one at a time; what only others hold takes no memory."""

    def __init__(self, module: nn.Module, flow: Dataflow, parts: Sequence[Part]) -> None:
        self.module = module
        self.parts = tuple(parts)
        self._flow = self._usual = flow
        self._part = self.parts[0]
        self._calls = 0
        self._counting = False  # in `run`, and in none of the calls
        self._values: dict[Value, Tensor] = {}
        parts_by_name = {one.name: module.get_submodule(one.name) for one in flow.calls}
        self._patched = [(inner, vars(inner).get("forward")) for inner in parts_by_name.values()]
        mine = {name for part in parts for name in held(module, flow, part)}
        for name, parameter in module.named_parameters():
            if name not in mine:
                parameter.requires_grad_(False)
                parameter.data = parameter.new_zeros(()).expand(parameter.shape)
        for name, inner in parts_by_name.items():
            inner.forward = partial(self._visit, name, inner.forward)

    def run(
        self,
        number: int,
        batch: Any,
        received: Sequence[Tensor],
        *,
        flow: Dataflow | None = None,
        forward: Forward | None = None,
    ) -> Any:
        """Part `number`: the module's output where it is the last one, else the tensors of its `sends`, contiguous.

        `received` has those of its `receives`; `flow` is that of a batch of this shape, if it is another than the one
        that the module was cut with. Raises JobError where the module calls its parts in another order than then.
        """
        self._flow = flow or self._usual
        self._part = self.parts[number]
        self._counting = True
        self._calls = 0
        self._values = dict(zip(self._part.receives, received, strict=True))
        try:
            return call(self.module, batch, forward)
        except _Cut:
            return tuple(_leaving(self._values[v], received) for v in self._part.sends)
        finally:
            self._values = {}
            self._counting = False

    def close(self) -> None:
        """The module's parts run as they did before; what other stages hold stays away."""
        for inner, replaced in self._patched:
            del inner.forward
            if replaced is not None:  # the user's own, on this one object
                inner.forward = replaced

    def _visit(self, name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._counting:  # a part of a part, or one that backward computes again
            return own(*args, **kwargs)
        number = self._calls
        self._calls += 1
        if number >= len(self._flow.calls) or self._flow.calls[number].name != name:
            raise JobError(
                f"'{name}' is call {number} of this batch, which it was not when the model was cut. The order in which "
                "forward calls its parts must not depend on chance or on numbers."
            )
        if number < self._part.first:
            return self._stand_in(number, leaves_of((args, kwargs)))
        self._counting = False
        try:
            output = own(*args, **kwargs)
        finally:
            self._counting = True
        for index, leaf in enumerate(leaves_of(output)):
            if (number, index) in self._part.sends:
                self._values[number, index] = leaf
        if number == self._part.last and number + 1 < len(self._flow.calls):
            raise _Cut
        return output

    def _stand_in(self, number: int, given: Sequence[Any]) -> Any:
        """What an earlier stage's call returned, as far as anything here depends on it."""
        one = self._flow.calls[number]
        leaves: list[Any] = []
        for index, leaf in enumerate(one.leaves):
            if isinstance(leaf, Passed):
                leaves.append(given[leaf.argument])
            elif isinstance(leaf, Plain):
                leaves.append(leaf.value)
            elif (number, index) in self._values:
                leaves.append(self._values[number, index])
            else:
                leaves.append(torch.zeros((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape))
        return tree_unflatten(leaves, one.tree)


def _leaving(value: Tensor, received: Sequence[Tensor]) -> Tensor:
    """Contiguous, and a tensor of its own: backward begins with it, and schedules detach it in place, which no view
    allows."""
    if value._is_view() or not value.is_contiguous() or any(value is each for each in received):
        return value.clone(memory_format=torch.contiguous_format)
    return value
