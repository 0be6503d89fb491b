"""A split is kept if the module, run in lock-step by all ranks of it in one process, computes what it did whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.models.partial import copy_without_memory
from shardwise.parallel.tensor.atoms import Ids, spans
from shardwise.parallel.tensor.capture import Captured
from shardwise.parallel.tensor.links import narrowed
from shardwise.parallel.tensor.program import GATHER, JOIN, LOCAL, SCATTER, SUM, Program, build, steps
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.sequence import sequenced
from shardwise.parallel.tensor.sequence_program import build_sequence
from shardwise.parallel.tensor.shares import Share

TOLERANCE = 1e-9  # relative, in float64
FLOOR = 1e-6  # of the largest: gradients smaller than that are zero but for rounding


class Alone:
    """One rank's links among those that run in lock-step: what is whole is one tensor, so autograd itself sums."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def enter(self, x: Tensor) -> Tensor:
        return x

    def enter_all(self, *given: Tensor) -> tuple[Tensor, ...]:
        return given

    def take(self, x: Tensor, dim: int, ids: Ids) -> Tensor:
        return part(x, dim, ids, self.rank)

    def split(self, x: Tensor, share: Share) -> Tensor:
        return narrowed(x, share.dim, share.held[self.rank])


def part(x: Tensor, dim: int, ids: Ids, rank: int) -> Tensor:
    """The indices of `rank` along `dim`."""
    return narrowed(x, dim, spans(ids, rank))


def joined(pieces: Sequence[Tensor], dim: int, ids: Ids) -> Tensor:
    """The whole of the ranks' parts."""
    whole = torch.cat(list(pieces), dim)
    order = [index for rank in range(len(pieces)) for first, stop in spans(ids, rank) for index in range(first, stop)]
    if order == list(range(len(order))):
        return whole
    places = torch.empty(len(order), dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(len(order))
    return whole.index_select(dim, places.to(whole.device))


def together(programs: Sequence[Program], constants: nn.Module, given: Sequence[Sequence[Any]]) -> list[Any]:
    """Run the ranks' programs node by node; `given[rank]` are its inputs after the links."""
    links = [Alone(rank) for rank in range(len(programs))]
    values: list[dict[fx.Node, Any]] = [{} for _ in programs]
    inputs = [iter((links[rank], *given[rank])) for rank in range(len(programs))]
    for nodes in zip(*(program.graph.nodes for program in programs), strict=True):
        role = nodes[0].meta.get("role")
        if nodes[0].op == "output":
            return [_value(leaf, values[0]) for leaf in nodes[0].args[0]]
        if nodes[0].op == "placeholder":
            found = [next(one) for one in inputs]
        elif nodes[0].op == "get_attr":
            found = [getattr(constants, nodes[0].target)] * len(nodes)
        elif role in (SUM, JOIN, SCATTER, GATHER):
            args = [fx.node.map_arg(n.args[1:], v.__getitem__) for n, v in zip(nodes, values, strict=True)]
            found = _exchange(role, args)
        elif role == LOCAL:
            found = [_run(node, value) for node, value in zip(nodes, values, strict=True)]
        else:
            found = [_run(nodes[0], values[0])] * len(nodes)
        for node, value, one in zip(nodes, values, found, strict=True):
            value[node] = one
    raise AssertionError("a graph without an output")


def _exchange(role: str, args: Sequence[Sequence[Any]]) -> list[Any]:
    """What each rank gets."""
    if role in (JOIN, GATHER):
        pieces, how = [one[0] for one in args], args[0][1:]
        return [united(pieces, *how) if isinstance(how[0], Share) else joined(pieces, *how)] * len(args)
    total = args[0][0]
    for one in args[1:]:
        total = total + one[0]
    if role == SCATTER:
        share = args[0][1]
        return [narrowed(total, share.dim, held) for held in share.held]
    return [total if len(args[0]) == 1 else total + args[0][1].to(total.dtype)] * len(args)


def united(pieces: Sequence[Tensor], share: Share) -> Tensor:
    """The whole of the ranks' parts."""
    ids = [0] * sum(share.rows)
    for rank, each in enumerate(share.held):
        for first, stop in each:
            ids[first:stop] = [rank] * (stop - first)
    return joined(pieces, share.dim, tuple(ids))


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _value(leaf: Any, values: dict[fx.Node, Any]) -> Any:
    return values[leaf] if isinstance(leaf, fx.Node) else leaf


def difference(
    module: nn.Module,
    args: Any,
    kwargs: Any,
    captured: Captured,
    owned: Mapping[str, Owned],
    ranks: int,
    *,
    sequence: bool = False,
) -> tuple[float, str]:
    """The largest relative difference between the call run whole and split, of outputs and gradients, and of what.

    In float64; `captured` is of the same call in float64. The generators stay as they are. With `sequence` values
    between the layers are cut along the sequence, where that gains anything.
    """
    programs = _programs(captured, owned, ranks, sequence)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    leaves, _ = tree_flatten((args, kwargs))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = run_whole(module, args, kwargs)
        torch.manual_seed(0)
        ours = {n: t.detach().requires_grad_() if t.requires_grad else t.detach().clone() for n, t in state.items()}
        tensors = [as_leaf(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        handed = [tensor.clone() for tensor in tensors]
        held = [[part(t, *owned[n], rank) if n in owned else t for n, t in ours.items()] for rank in range(ranks)]
        outputs = together(programs, captured.constants, [[*mine, *handed] for mine in held])
    inputs = {**ours, **{f"argument {i}": tensor for i, tensor in enumerate(tensors)}}
    found = with_gradients([*outputs, *_written(handed)], inputs)
    return compare(expected, found | {f"buffer {name}": ours[name] for name, _ in module.named_buffers()})


def _written(handed: Sequence[Tensor]) -> list[Tensor]:
    """The arguments that the call wrote into: outputs too."""
    return [tensor for tensor in handed if tensor._version]


def _programs(captured: Captured, owned: Mapping[str, Owned], ranks: int, sequence: bool) -> list[Program]:
    cut = sequenced(captured, owned, ranks, leave=True) if sequence else None
    if cut is not None:
        return [build_sequence(captured, cut, rank, ranks) for rank in range(ranks)]
    plan = steps(captured, owned, ranks)
    return [build(captured, plan, rank) for rank in range(ranks)]


def as_leaf(tensor: Tensor) -> Tensor:
    """A copy of its own, with a gradient."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def run_whole(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a call of a copy of the module."""
    twin = copy_without_memory(module)
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [as_leaf(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    handed = [tensor.clone() for tensor in tensors]  # what is no leaf may be written into
    each = iter(handed)
    a, k = tree_unflatten([next(each) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
    outputs, _ = tree_flatten(twin(*a, **k))
    state = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    inputs = {**state, **{f"argument {i}": one for i, one in enumerate(tensors)}}
    buffers = {f"buffer {name}": buffer for name, buffer in twin.named_buffers()}
    return with_gradients([*outputs, *_written(handed)], inputs) | buffers


def with_gradients(outputs: Sequence[Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of a sum of them in which every element has a weight of its own."""
    found = {f"output {i}": one.detach() for i, one in enumerate(outputs) if isinstance(one, Tensor)}
    wanted = [one for one in outputs if isinstance(one, Tensor) and one.requires_grad and one.is_floating_point()]
    total = sum((one * torch.linspace(0.5, 1.5, one.numel(), dtype=one.dtype).view_as(one)).sum() for one in wanted)
    named = {name: one for name, one in inputs.items() if one.requires_grad}
    if not isinstance(total, Tensor) or not named:
        return found
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return found | {f"gradient of {n}": g for n, g in zip(named, grads, strict=True) if g is not None}


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference, and of what."""
    worst, where = 0.0, ""
    floor = FLOOR * max((_largest(g) for g in expected.values() if g.is_floating_point()), default=1.0)
    for name in dict.fromkeys((*expected, *found)):
        a, b = expected.get(name), found.get(name)
        if a is None or b is None:
            one = a if a is not None else b
            assert one is not None
            gap = float("inf") if one.abs().max() > 0 else 0.0
        elif a.is_floating_point():
            gap = _gap(a, b, floor)
        else:
            gap = 0.0 if torch.equal(a, b) else float("inf")
        if math.isnan(gap):
            return math.inf, name
        if gap > worst:
            worst, where = gap, name
    return worst, where


def _gap(a: Tensor, b: Tensor, floor: float) -> float:
    """The largest difference, relative to the largest of `a`; infinities that both have are none, a NaN stays one."""
    if not a.numel():
        return 0.0
    most = float((a - b).masked_fill(a == b, 0).abs().max())
    scale = max(_largest(a), floor)
    return most / scale if scale else math.inf if most else 0.0


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude."""
    return float(tensor.masked_fill(~tensor.isfinite(), 0).abs().max()) if tensor.numel() else 0.0
