"""Where a module may be cut into stages, what crosses each cut, and what the calls between them cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import nn

from shardwise.errors import JobError
from shardwise.models.dataflow import Dataflow, Forward, Loss, Made, Needs, Value, dataflow
from shardwise.models.profile import AFTER, BEFORE, Build, Measurement, on_samples
from shardwise.spec.profile import BlockProfile, CallProfile


class Part(NamedTuple):
    """Calls `first..last` (inclusive) of a dataflow: the values that come in, those that go on, and the parameters and
    buffers outside of calls that it reads."""

    first: int
    last: int
    receives: tuple[Value, ...]
    sends: tuple[Value, ...]
    tensors: frozenset[str]


def parts(flow: Dataflow, firsts: Sequence[int]) -> list[Part]:
    """The stages that begin with these calls, in ascending order, the first of them 0.

    A value that several later stages need goes through all between. Raises JobError for more stages than calls, and
    where a stage would have to draw again what an earlier one has drawn.
    """
    count = len(flow.calls)
    if list(firsts) != sorted(set(firsts)) or not firsts or firsts[0] != 0 or firsts[-1] >= count:
        raise JobError(
            f"the model cannot be cut before its calls {list(firsts)}: it has {count}, each stage needs one of its "
            "own, and the first begins with call 0. Choose fewer stages."
        )
    ends = [*firsts[1:], count]
    needs = [_needed(flow, first, end) for first, end in zip(firsts, ends, strict=True)]
    for first, each in zip(firsts, needs, strict=True):
        if early := [(after, line) for after, line in each.drawn if after < first]:
            raise JobError(
                f"the model cannot be cut before '{flow.calls[first].name}': what comes after it needs random numbers "
                f"that forward draws itself{min(early)[1]} (dropout outside of its parts). Put the dropout into a "
                "part, or use fewer stages."
            )
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


def made(flow: Dataflow, value: Value) -> Made:
    """What is known of a value that crosses."""
    number, index = value
    leaf = flow.calls[number].leaves[index]
    assert isinstance(leaf, Made), value
    return leaf


def profile_calls(
    build: Build, example: Any, *, forward: Forward | None = None, loss: Loss | None = None
) -> tuple[CallProfile, ...]:
    """The calls of a module in their order, each with its cost, as `profile` measures it.

    Raises JobError where the module cannot be cut, and when it cannot be run at all.
    """

    def measure(module: nn.Module, batch: Any, samples: int) -> tuple[CallProfile, ...]:
        flow = dataflow(module, batch, forward=forward, loss=loss)
        units = {one.name: module.get_submodule(one.name) for one in flow.calls}
        costs = Measurement(forward, loss).run(module, batch, samples, "", units)
        return _profiled(module, flow, {block.name: block for block in costs.blocks}, samples)

    return on_samples(measure, build, example)


def _profiled(
    module: nn.Module, flow: Dataflow, costs: dict[str, BlockProfile], samples: int
) -> tuple[CallProfile, ...]:
    counts = Counter(one.name for one in flow.calls)
    around = {0: costs.get(BEFORE), len(flow.calls) - 1: costs.get(AFTER)}
    found = []
    for number, one in enumerate(flow.calls):
        block, beside = costs[one.name], around.get(number)
        own = [p for name, p in module.named_parameters() if name.startswith(f"{one.name}.")]
        flops, kept = block.forward_flops / counts[one.name], block.activation_bytes / counts[one.name]
        if beside is not None:
            flops, kept = flops + beside.forward_flops, kept + beside.activation_bytes
        cut = _live([_needed(flow, number, len(flow.calls))], number)
        found.append(
            CallProfile(
                name=one.name,
                parameters=sum(p.numel() for p in own),
                parameter_bytes=sum(p.nbytes for p in own),
                forward_flops=flops,
                activation_bytes=round(kept),
                crossing_bytes=round(sum(_nbytes(made(flow, value)) for value in cut) / samples),
                reads=_reads(module, flow, number),
            )
        )
    return tuple(found)


def _reads(module: nn.Module, flow: Dataflow, number: int) -> dict[str, tuple[int, int]]:
    """Elements and bytes of the parameters that call `number` takes and that are not called after its part."""
    name = flow.calls[number].name
    part = Part(number, number, (), (), _needed(flow, number, number + 1).tensors)
    taken, every = held(module, flow, part), dict(module.named_parameters())
    return {each: (every[each].numel(), every[each].nbytes) for each in taken if not each.startswith(f"{name}.")}


def _nbytes(value: Made) -> int:
    return prod(value.shape) * value.dtype.itemsize
