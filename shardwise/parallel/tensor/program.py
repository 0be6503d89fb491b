"""From a graph and the ranks of its parameters' indices to what one rank runs, collectives included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from shardwise.parallel.tensor.atoms import Conflict, Cut, Ids, Ranks
from shardwise.parallel.tensor.capture import Captured, impure
from shardwise.parallel.tensor.elementwise import step_of, writes
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.step import State, Step, View

SHARED, LOCAL, SUM, JOIN = "shared", "local", "sum", "join"  # how ranks that run in lock-step treat a node
SCATTER, GATHER = "scatter", "gather"  # and those of what is cut along a sequence


class Links(Protocol):
    """What connects the ranks; the first input of every program."""

    def enter(self, x: Tensor) -> Tensor:
        """`x`, whose gradient is the sum over the ranks."""

    def total(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """The sum of the ranks' terms, and `addend` once."""

    def join(self, x: Tensor, dim: int, ids: Ids) -> Tensor:
        """The whole tensor of which each rank has its indices of `dim`."""

    def take(self, x: Tensor, dim: int, ids: Ids) -> Tensor:
        """This rank's indices of `dim`."""


class Plan(NamedTuple):
    """The steps of a graph, and what its outputs are. `sequence` are the nodes that are cut along the sequence, and
    `begun` those of them that come whole."""

    steps: dict[fx.Node, Step]
    states: dict[fx.Node, State]
    sequence: frozenset[fx.Node] = frozenset()
    begun: frozenset[fx.Node] = frozenset()


class Program(NamedTuple):
    """`graph` takes the links, the parameters and buffers, and the tensors of the call. `cut` are the outputs that it
    leaves cut, if it was told so, and `parts` the tensors of the call that come cut."""

    graph: fx.Graph
    cut: dict[int, Cut]
    parts: frozenset[int] = frozenset()


def steps(captured: Captured, owned: Mapping[str, Owned], ranks: int) -> Plan:
    """How values flow when parameters are cut as `owned` says. Raises Conflict where an operation cannot run so."""
    view = View(Ranks(), ranks, {})
    found: dict[fx.Node, Step] = {}
    names = dict(zip(captured.inputs, captured.names, strict=False))
    for node in captured.graph.nodes:
        if node.op == "placeholder" and names.get(node) in owned:
            one = owned[names[node]]
            view.states[node] = Cut(one.dim, one.ids)
        elif node.op == "call_function":
            found[node] = step_of(view, node)
            view.states[node] = found[node].out
    return Plan(found, view.states)


def build(captured: Captured, plan: Plan, rank: int, *, leave: bool = False) -> Program:
    """The program of one rank; with `leave` outputs stay cut, else they are joined."""
    return Builder(captured, plan, rank).run(leave)


class Builder:
    """Makes the program of one rank from what its steps say."""

    def __init__(self, captured: Captured, plan: Plan, rank: int) -> None:
        self.captured, self.plan, self.rank = captured, plan, rank
        self.graph = fx.Graph()
        self.links = self.graph.placeholder("links")
        self.links.meta["role"] = SHARED
        self.values: dict[fx.Node, fx.Node] = {}
        self.entered: dict[fx.Node, fx.Node] = {}
        self.taken: dict[tuple[fx.Node, Cut], fx.Node] = {}

    def run(self, leave: bool) -> Program:
        """The program; with `leave` its outputs stay cut."""
        cut: dict[int, Cut] = {}
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                self._given(node)
            elif node.op == "get_attr":
                self.values[node] = self._role(self.graph.get_attr(node.target), local=False)
            elif node.op == "call_function":
                self.values[node] = self._one(node, self.plan.steps[node])
            else:
                outputs = [self._output(leaf, i, leave, cut) for i, leaf in enumerate(node.args[0])]
                self.graph.output(outputs)
        self.graph.eliminate_dead_code(impure)
        return Program(self.graph, cut)

    def _given(self, node: fx.Node) -> None:
        self.values[node] = self._role(self.graph.placeholder(node.name), self._is_cut(node))

    def _whole(self, node: fx.Node) -> fx.Node:
        """What all ranks have alike."""
        return self.values[node]

    def _output(self, leaf: Any, index: int, leave: bool, cut: dict[int, Cut]) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        state = self.plan.states.get(leaf)
        value = self.values[leaf]
        if not isinstance(state, Cut):
            return value
        if leave:
            cut[index] = state
            return value
        return self._method("join", (value, state.dim, state.ids), JOIN)

    def _one(self, node: fx.Node, step: Step) -> fx.Node:
        if not step.local:
            made = self._role(self.graph.node_copy(node, self._whole), local=False)
            if writes(node) or _is_mode(node):
                self._forget()
            return made
        if step.noise is not None:
            return self._dropped(node, step)
        target: Any
        target, args, kwargs = step.call(self.rank) if step.call is not None else (node.target, node.args, node.kwargs)
        given = fx.node.map_arg((args, kwargs), lambda one: self._operand(one, step))
        made = self._role(self.graph.call_function(target, *given), local=True)
        return self._summed(made, node, step) if step.reduce else made

    def _summed(self, terms: fx.Node, node: fx.Node, step: Step) -> fx.Node:
        addend = () if step.addend is None else (self._whole(step.addend),)
        return self._method("total", (terms, *addend), SUM)

    def _forget(self) -> None:
        """What was handed out before an operation wrote is not what it left, or before a mode, without gradients."""
        self.entered.clear()
        self.taken.clear()

    def _operand(self, node: fx.Node, step: Step) -> fx.Node:
        """What is whole enters the ranks' own computations here, and each takes its part."""
        if self._is_cut(node) or not isinstance(node.meta.get("val"), Tensor):
            return self.values[node]
        return self._part(self._enter(node), step.wants.get(node))

    def _enter(self, node: fx.Node) -> fx.Node:
        if node not in self.entered:
            value = node.meta["val"]
            carries = value.is_floating_point() or value.is_complex()
            self.entered[node] = self._method("enter", (self.values[node],), SHARED) if carries else self.values[node]
        return self.entered[node]

    def _part(self, value: fx.Node, cut: Cut | None) -> fx.Node:
        if cut is None:
            return value
        if (value, cut) not in self.taken:
            self.taken[value, cut] = self._method("take", (value, cut.dim, cut.ids), LOCAL)
        return self.taken[value, cut]

    def _share(self, noise: fx.Node, cut: Cut) -> fx.Node:
        """A copy of a part of a mask: who keeps it does not keep the whole mask."""
        return self._role(self.graph.call_function(torch.clone, (self._part(noise, cut),)), local=True)

    def _dropped(self, node: fx.Node, step: Step) -> fx.Node:
        """A dropout: each rank draws the whole mask, as one process would, and takes its part."""
        assert step.noise is not None
        chance, cut = step.noise
        x: Any = node.args[0]
        if node.target._opname == "scaled_dot_product_attention":  # type: ignore[union-attr]
            return self._attention(node, step)
        value = x.meta["val"]
        args = (tuple(value.shape), tuple(value.stride()), value.dtype, value.device, chance)
        noise = self._role(self.graph.call_function(mask, args), local=False)
        mine = self._share(noise, cut)
        return self._role(self.graph.call_function(torch.mul, (self._operand(x, step), mine)), local=True)

    def _attention(self, node: fx.Node, step: Step) -> fx.Node:
        from shardwise.parallel.tensor.products import arguments_of_attention, attend

        given = arguments_of_attention(node)
        query, key = given["query"].meta["val"], given["key"].meta["val"]
        whole = (*query.shape[:-1], key.shape[-2])
        kind = query.dtype if query.dtype in (torch.float32, torch.float64) else torch.float32
        assert step.noise is not None
        strides = torch.empty(whole, device="meta").stride()
        noise = self.graph.call_function(mask, (whole, strides, kind, query.device, step.noise[0]))
        mine = self._share(self._role(noise, local=False), step.noise[1])
        operands = [self._operand(given[name], step) for name in ("query", "key", "value")]
        bias = self._operand(given["attn_mask"], step) if given["attn_mask"] is not None else None
        told = (*operands, bias, mine, bool(given["is_causal"]), given["scale"])
        return self._role(self.graph.call_function(attend, told), local=True)

    def _is_cut(self, node: fx.Node) -> bool:
        state = self.plan.states.get(node)
        return state is not None and (isinstance(state, Cut) or any(each is not None for each in state))

    def _method(self, name: str, args: Sequence[Any], role: str) -> fx.Node:
        node = self.graph.call_method(name, (self.links, *args))
        node.meta["role"] = role
        return node

    def _role(self, node: fx.Node, local: bool) -> fx.Node:
        node.meta["role"] = LOCAL if local else SHARED
        return node


def mask(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: Any, chance: float) -> Tensor:
    """What dropout multiplies a tensor of such a layout with: zeros, and 1 / (1 - chance)."""
    ones = torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1)
    return torch.dropout(ones, chance, True)


def _is_mode(node: fx.Node) -> bool:
    """Whether it turns gradients or autocast on or off."""
    return not hasattr(node.target, "_schema") and getattr(node.target, "__name__", "") != "getitem"


__all__ = ["Conflict", "Links", "Program", "build", "steps"]
