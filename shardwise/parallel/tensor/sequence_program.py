"""The program of one rank where values are cut along the sequence."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from shardwise.parallel.tensor.atoms import Cut
from shardwise.parallel.tensor.capture import Captured
from shardwise.parallel.tensor.elementwise import writes
from shardwise.parallel.tensor.program import GATHER, JOIN, LOCAL, SCATTER, SHARED, Builder, Plan, Program
from shardwise.parallel.tensor.shares import Share, share_of
from shardwise.parallel.tensor.step import Step, shape


def build_sequence(captured: Captured, plan: Plan, rank: int, ranks: int, *, leave: bool = False) -> Program:
    """The program of one rank; with `leave` outputs stay cut along the sequence."""
    return SequenceBuilder(captured, plan, rank, ranks).run(leave)


def plus(total: Tensor, addend: Tensor) -> Tensor:
    """A sum that keeps the dtype of `total`, which may be autocast's."""
    return total + addend.to(total.dtype)


class SequenceBuilder(Builder):
    """Sums are scattered, and what an operation needs whole is put together before it."""

    def __init__(self, captured: Captured, plan: Plan, rank: int, ranks: int) -> None:
        super().__init__(captured, plan, rank)
        self.ranks = ranks
        self.whole: dict[fx.Node, fx.Node] = {}  # of what is cut along the sequence
        self.written = False

    def _given(self, node: fx.Node) -> None:
        if node in self.plan.begun:
            self.whole[node] = self._role(self.graph.placeholder(node.name), local=False)
        else:
            super()._given(node)

    def _one(self, node: fx.Node, step: Step) -> fx.Node:
        made = super()._one(node, step)
        if step.local and writes(node):
            self._forget()
        return made

    def _output(self, leaf: Any, index: int, leave: bool, cut: dict[int, Cut]) -> Any:
        if not isinstance(leaf, fx.Node) or leaf not in self.plan.sequence:
            return super()._output(leaf, index, False, cut)
        state = self.plan.states[leaf]
        if not leave or leaf in self.whole:
            return self._whole(leaf)
        assert isinstance(state, Cut)
        cut[index] = state
        return self.values[leaf]

    def _forget(self) -> None:
        super()._forget()
        self.whole = {node: known for node, known in self.whole.items() if node in self.plan.begun}
        for node in self.plan.begun:
            self.values.pop(node, None)

    def _whole(self, node: fx.Node) -> fx.Node:
        if node not in self.plan.sequence or not isinstance(self.plan.states.get(node), Cut):
            return super()._whole(node)
        if node not in self.whole:
            self.whole[node] = self._method("merge", (self.values[node], self._cut(node)), JOIN)
        return self.whole[node]

    def _cut(self, node: fx.Node) -> Share:
        cut = self.plan.states[node]
        assert isinstance(cut, Cut)
        return share_of(cut, self.ranks)

    def _operand(self, node: fx.Node, step: Step) -> fx.Node:
        if node in self.plan.sequence:
            return self._gathered(node) if node in step.gathers else self._local(node)
        if self._is_cut(node) or not isinstance(node.meta.get("val"), Tensor):
            return self.values[node]
        if not step.sequence:
            return super()._operand(node, step)
        if node in step.wants:
            return self._split(self.values[node], step.wants[node])
        return self._enter(node)

    def _local(self, node: fx.Node) -> fx.Node:
        if node not in self.values:  # it came whole
            self.values[node] = self._method("split", (self.whole[node], self._cut(node)), LOCAL)
        return self.values[node]

    def _gathered(self, node: fx.Node) -> fx.Node:
        """For computations of the ranks' own."""
        if node not in self.entered:
            known = self.whole.get(node)
            if known is not None:
                self.entered[node] = self._method("enter", (known,), SHARED)
            else:
                self.entered[node] = self._method("gather", (self.values[node], self._cut(node)), GATHER)
        return self.entered[node]

    def _split(self, value: fx.Node, cut: Cut) -> fx.Node:
        if (value, cut) not in self.taken:
            self.taken[value, cut] = self._method("split", (value, share_of(cut, self.ranks)), LOCAL)
        return self.taken[value, cut]

    def _share(self, noise: fx.Node, cut: Cut) -> fx.Node:
        return self._split(noise, cut)

    def _enter(self, node: fx.Node) -> fx.Node:
        """The first parameter that parts are computed with brings all of them: their gradients are summed together."""
        if node not in self.entered and node.op == "placeholder" and not self.written:
            self.written = True
            mine = self._parameters()
            every = self._method("enter_all", [self.values[one] for one in mine], SHARED)
            for place, one in enumerate(mine):
                self.entered[one] = self._role(self.graph.call_function(operator.getitem, (every, place)), local=False)
        return super()._enter(node)

    def _parameters(self) -> list[fx.Node]:
        """The whole parameters that computations on parts of the sequence take as they are."""
        names = dict(zip(self.captured.inputs, self.captured.names, strict=False))
        found: dict[fx.Node, None] = {}
        for step_of, step in self.plan.steps.items():
            if step.sequence:
                given = [one for one in step_of.all_input_nodes if one not in step.wants]
                found |= dict.fromkeys(one for one in given if one in names and not self._is_cut(one))
        return [one for one in found if one.meta["val"].is_floating_point()]

    def _summed(self, terms: fx.Node, node: fx.Node, step: Step) -> fx.Node:
        if not isinstance(step.out, Cut):
            return super()._summed(terms, node, step)
        found = self._method("scatter", (terms, share_of(step.out, self.ranks)), SCATTER)
        if step.addend is None:
            return found
        return self._role(
            self.graph.call_function(plus, (found, self._addend(step.addend, node, step.out))), local=True
        )

    def _addend(self, node: fx.Node, total: fx.Node, cut: Cut) -> fx.Node:
        """What is added to a part of the sum `total`."""
        if node in self.plan.sequence and self.plan.states[node] == cut:
            return self._local(node)
        size = shape(node)
        place = cut.dim - len(shape(total)) + len(size)
        if place < 0 or size[place] == 1:
            return self._enter(node) if node not in self.plan.sequence else self._gathered(node)
        return self._split(self._whole(node), Cut(place, cut.ids))
