"""What one operation of a graph becomes when some of its operands are cut."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from shardwise.parallel.tensor.atoms import Conflict, Cut, Ids, Numbers

State = Any  # None: whole on every rank; a Cut; a tuple of states for an operation with several results
Labels = Sequence[Any]  # a name for each dim
Sizes = Callable[[int], int]  # rank -> the indices it holds
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Step(NamedTuple):
    """What an operation becomes.

    `wants` are the whole operands of which each rank takes its part. With `reduce` every rank has a term of the result,
    which is summed; `addend` is added after that, and `call` is what runs instead of the node's own target, given the
    number of indices that a rank holds. What has both `reduce` and a cut result is summed part by part. `gathers` are
    the cut operands that are needed whole, and with `sequence` ranks compute parts of a sequence.
    """

    out: State = None
    wants: Mapping[fx.Node, Cut] = {}
    reduce: bool = False
    addend: fx.Node | None = None
    call: Callable[[int], Call] | None = None
    noise: tuple[float, Cut] | None = None
    gathers: tuple[fx.Node, ...] = ()
    sequence: bool = False

    @property
    def local(self) -> bool:
        """Whether ranks compute unlike things."""
        return self.reduce or is_cut(self.out)


def is_cut(state: State) -> bool:
    """Whether any of the values that it tells of is cut."""
    if isinstance(state, Cut):
        return True
    return isinstance(state, tuple) and any(map(is_cut, state))


class View:
    """A graph while states go through it: what a rule may ask."""

    def __init__(self, numbers: Numbers, ranks: int, states: dict[fx.Node, State]) -> None:
        self.numbers, self.ranks, self.states = numbers, ranks, states

    def state(self, value: Any) -> State:
        return self.states.get(value) if isinstance(value, fx.Node) else None

    def cut(self, value: Any) -> Cut | None:
        """The cut of a single tensor."""
        state = self.state(value)
        return state if isinstance(state, Cut) else None

    def column(self, weight: fx.Node, dim: int) -> Ids | None:
        """While looking: fresh atoms for a dim of a whole weight whose product may be cut there."""
        return None

    def choose(self, node: fx.Node, options: int) -> int:
        """Which of several ways is tried."""
        return 0


def shape(value: Any) -> tuple[int, ...]:
    """Of what a node computes."""
    return tuple(value.meta["val"].shape)


def argument(node: Any, name: str) -> Any:
    """What an operation is given for one of its schema's arguments, or the argument's default."""
    for place, one in enumerate(node.target._schema.arguments):
        if one.name == name:
            default = one.default_value if one.has_default_value() else None
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
    return None


def counts(ids: Ids) -> Sizes:
    return lambda rank: sum(1 for owner in ids if owner == rank)


def labelled(
    view: View,
    operands: Sequence[tuple[Any, Labels]],
    out: Labels,
    *,
    blocked: Sequence[Hashable] = (),
    several: bool = False,
    sums: bool = False,
    preset: Mapping[Hashable, Ids] | None = None,
    call: Callable[[Hashable], Callable[[int], Call] | None] | None = None,
    addend: fx.Node | None = None,
) -> Step:
    """The step of an operation whose dims have names: one name may be cut, in every operand that has it.

    A name that is not in `out` is summed over (`sums`); None marks a dim that is the same for all. Raises Conflict.
    """
    cut: dict[Hashable, Ids] = dict(preset or {})
    for operand, labels in operands:
        state = view.cut(operand)
        if state is None:
            continue
        label = labels[state.dim]
        if label is None or label in blocked:
            raise Conflict("it needs a whole dim")
        if label in cut:
            view.numbers.same(cut[label], state.ids)
        else:
            cut[label] = state.ids
    if not cut:
        return Step(out=(None,) * len(out) if several else None)
    if len(cut) > 1:
        raise Conflict("its operands are cut along different dims")
    ((label, ids),) = cut.items()
    results = list(out) if several else [out]
    found = [Cut(list(one).index(label), ids) if label in one else None for one in results]
    reduce = not any(found)
    if reduce and not sums:
        raise Conflict("it needs a whole dim")
    wants = {
        operand: Cut(list(labels).index(label), ids)
        for operand, labels in operands
        if isinstance(operand, fx.Node) and label in labels and view.cut(operand) is None
    }
    return Step(
        out=None if reduce else tuple(found) if several else found[0],
        wants=wants,
        reduce=reduce,
        addend=addend if reduce else None,
        call=call(label) if call is not None else None,
    )
