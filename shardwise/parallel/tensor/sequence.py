"""Sequence parallelism: what is between the cut layers of a unit is cut along the sequence (Korthikanti et al. 2022).

    whole:     norm -> [column .. row] -> sum of the ranks' terms -> add -> norm -> ...       all of it on every rank
    sequence:  norm -> gather -> [column .. row] -> scatter -> add -> norm -> gather -> ...   a part on each

The steps of a unit are planned anew: sums leave their parts on the ranks, and what follows is computed there until an
operation needs the whole. Any cut of any value is right, by the rules of each operation; which dim is the sequence only
decides what it costs. So the ways in which a sum may be cut are tried, and the cheapest is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from shardwise.parallel.tensor.aliases import written
from shardwise.parallel.tensor.atoms import Conflict, Cut, Ranks, deal
from shardwise.parallel.tensor.capture import Captured
from shardwise.parallel.tensor.elementwise import step_of, writes
from shardwise.parallel.tensor.program import Plan, steps
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.step import Step, View, is_cut, shape

LOCAL_GAIN = 1.0  # what a number that one rank alone computes and keeps is worth, in numbers sent
MASKED = ("dropout", "scaled_dot_product_attention")  # draws of which a rank can take its part


class Hidden(NamedTuple):
    """What goes from block to block: its shape, and how it is cut."""

    shape: tuple[int, ...]
    cut: Cut


def sequenced(
    captured: Captured,
    owned: Mapping[str, Owned],
    ranks: int,
    given: Mapping[fx.Node, Cut] | None = None,
    *,
    leave: bool = False,
) -> Plan | None:
    """The steps of a graph with sums cut along the sequence; None where that gains nothing.

    `given` are the inputs that come cut already, and with `leave` outputs may stay so. Raises Conflict where an
    operation cannot run with parameters cut as `owned` says.
    """
    base = steps(captured, owned, ranks)
    sums = [node for node, step in base.steps.items() if step.reduce]
    hidden = _hidden(captured, sums, ranks, given or {})
    if hidden is None:
        return None
    walk = _Walk(captured, owned, ranks, given or {}, hidden)
    options = [[*_ways(hidden, shape(node)), None] for node in sums]
    choice: list[Cut | None] = [each[0] for each in options]
    found = walk.plan(dict(zip(sums, choice, strict=True)))
    cost = walk.cost(found, leave)
    for place, each in enumerate(options):
        for way in each[1:]:
            other = [*choice[:place], way, *choice[place + 1 :]]
            plan = walk.plan(dict(zip(sums, other, strict=True)))
            if (less := walk.cost(plan, leave)) < cost:
                found, cost, choice = plan, less, other
    return found if given or cost < walk.cost(base, leave) else None


def _activations(captured: Captured) -> list[fx.Node]:
    """The inputs that are neither parameters nor buffers."""
    return captured.inputs[len(captured.names) :]


def _hidden(captured: Captured, sums: Sequence[fx.Node], ranks: int, given: Mapping[fx.Node, Cut]) -> Hidden | None:
    """The first input that has as many numbers as a sum, those that come cut before others."""
    sizes = {(shape(node)[-1], node.meta["val"].numel()) for node in sums if shape(node)}
    for node in sorted(_activations(captured), key=lambda one: one not in given):
        value = node.meta["val"]
        if value.dim() < 2 or not value.is_floating_point() or (value.shape[-1], value.numel()) not in sizes:
            continue
        if node in given:
            return Hidden(shape(node), given[node])
        dim = max(range(value.dim() - 1), key=lambda d: (value.shape[d], d))  # the longest: parts are the most equal
        if value.shape[dim] >= ranks:
            return Hidden(shape(node), Cut(dim, tuple(deal(range(value.shape[dim]), ranks).values())))
    return None


def _ways(hidden: Hidden, size: tuple[int, ...]) -> list[Cut]:
    """How a sum of shape `size` is cut if it has the hidden values, in their order of dims or another."""
    last = len(hidden.shape) - 1
    if size == hidden.shape:
        return [hidden.cut]
    if hidden.cut.dim == last or size[-1] != hidden.shape[-1]:
        return []
    lead = hidden.shape[:last]
    if torch.Size(lead).numel() != torch.Size(size[:-1]).numel():
        return []
    along = [-1 if d == hidden.cut.dim else 1 for d in range(last)]
    owners = torch.tensor(hidden.cut.ids).view(along).expand(lead)
    found: list[Cut] = []
    for order in itertools.permutations(range(last)):
        cut = _single(owners.permute(order).reshape(size[:-1]))
        if cut is not None and cut not in found:
            found.append(cut)
    return found


def _single(owners: torch.Tensor) -> Cut | None:
    """The cut of a tensor whose elements have these owners, if it is along one dim."""
    for dim in range(owners.dim()):
        row = owners.movedim(dim, 0).reshape(owners.shape[dim], -1)[:, 0]
        if torch.equal(row.view([-1 if d == dim else 1 for d in range(owners.dim())]).expand_as(owners), owners):
            return Cut(dim, tuple(row.tolist()))
    return None


class _Walk:
    def __init__(
        self,
        captured: Captured,
        owned: Mapping[str, Owned],
        ranks: int,
        given: Mapping[fx.Node, Cut],
        hidden: Hidden,
    ) -> None:
        self.captured, self.ranks, self.given = captured, ranks, given
        self.parameters = dict(zip(captured.inputs, captured.names, strict=False))
        self.owned = {node: owned[name] for node, name in self.parameters.items() if name in owned}
        alike = [node for node in _activations(captured) if shape(node) == hidden.shape and node not in given]
        self.groups = written(captured.graph)  # what is written into, with what shares its storage
        alike = [node for node in alike if not any(node in group for group in self.groups)]
        self.begun = {node: hidden.cut for node in alike if node.meta["val"].is_floating_point()}

    def plan(self, cuts: Mapping[fx.Node, Cut | None]) -> Plan:
        """The steps with sums cut as `cuts` says. What is written into is cut with all that shares its storage, or
        whole with it."""
        held: set[fx.Node] = set()
        while True:
            found = self._try(cuts, held)
            mixed = [group for group in self.groups if 0 < len(group & found.sequence) < len(group)]
            mixed = [group for group in mixed if not group <= held]
            if not mixed:
                return found
            held.update(*mixed)

    def _try(self, cuts: Mapping[fx.Node, Cut | None], held: set[fx.Node]) -> Plan:
        begun = {node: cut for node, cut in self.begun.items() if node not in held}
        view = View(Ranks(), self.ranks, {**begun, **self.given})
        view.states |= {node: Cut(one.dim, one.ids) for node, one in self.owned.items()}
        sequence = {*begun, *self.given}
        found: dict[fx.Node, Step] = {}
        for node in self.captured.graph.nodes:
            if node.op != "call_function":
                continue
            step = self._step(view, node, sequence, held)
            cut = cuts.get(node)
            if step.reduce and cut is not None and node not in held:
                step = step._replace(out=cut, sequence=True)
            found[node] = step
            view.states[node] = step.out
            if step.sequence:
                sequence.add(node)
        return Plan(found, view.states, frozenset(sequence), frozenset(begun))

    def _step(self, view: View, node: fx.Node, sequence: set[fx.Node], held: set[fx.Node]) -> Step:
        """On the parts, where there is a rule for it; else on the whole."""
        mine = tuple(one for one in node.all_input_nodes if one in sequence)
        if not mine:
            return step_of(view, node)
        if node not in held and not _draws(node):
            try:
                step = step_of(view, node)
            except Conflict:
                pass
            else:
                if is_cut(step.out) and not step.reduce and not any(map(self._matrix, _entering(view, node, step))):
                    return step._replace(sequence=True)
        states = {one: view.states.pop(one) for one in mine}
        try:
            return step_of(view, node)._replace(gathers=mine)
        finally:
            view.states.update(states)

    def _matrix(self, node: fx.Node) -> bool:
        """Whether it is a parameter whose gradient is too large to be exchanged."""
        return node in self.parameters and sum(size > 1 for size in shape(node)) > 1

    def cost(self, plan: Plan, leave: bool) -> float:
        """Numbers sent, forward and backward, less what is gained by what is cut."""
        return sum(_Costs(plan, leave).each(self.captured))


def _draws(node: fx.Node) -> bool:
    """Whether it draws random numbers of which a rank cannot take its part."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return writes(node) or getattr(node.target, "_opname", "") not in MASKED


def _entering(view: View, node: fx.Node, step: Step) -> Iterator[fx.Node]:
    """The operands that every rank needs all of."""
    given = (one for one in node.all_input_nodes if isinstance(one.meta.get("val"), torch.Tensor))
    yield from (one for one in given if one not in step.wants and not is_cut(view.state(one)))


class _Costs:
    """What each node costs in numbers sent; an exchange that several nodes need counts once."""

    def __init__(self, plan: Plan, leave: bool) -> None:
        self.plan, self.leave = plan, leave
        self.known: set[tuple[str, fx.Node]] = set()

    def each(self, captured: Captured) -> Iterator[float]:
        for node in captured.graph.nodes:
            if node.op == "output":
                outputs = [one for one in node.all_input_nodes if one in self.plan.sequence]
                yield from (self._once("merge", one, 1) for one in outputs if not self.leave)
            elif node.op == "call_function":
                step = self.plan.steps[node]
                yield 2 * _numbers(node) if step.reduce else -LOCAL_GAIN * _numbers(node) * step.sequence
                yield from (self._operand(one, step) for one in node.all_input_nodes)

    def _operand(self, node: fx.Node, step: Step) -> float:
        mine = node in self.plan.sequence
        if not step.local:
            return self._once("merge", node, 1) if mine and node not in self.plan.begun else 0
        if mine and node in step.gathers:
            return self._once("gather", node, 2)
        if node in self.plan.begun:
            return self._once("split", node, 1)
        if is_cut(self.plan.states.get(node)):
            return 0
        return self._once("split", node, 1) if step.sequence and node in step.wants else self._once("enter", node, 2)

    def _once(self, what: str, node: fx.Node, times: int) -> float:
        if (what, node) in self.known:
            return 0
        self.known.add((what, node))
        return times * _numbers(node) + 1  # of two ways that send as much, that of fewer messages


def _numbers(node: Any) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return sum(one.numel() for one in values if isinstance(one, torch.Tensor) and one.is_floating_point())
