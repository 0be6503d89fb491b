"""A mixture of experts on one rank of the tensor axis: its own code runs with this rank's experts, the others are zero.

Tokens, routing and all that is no expert are the same on all ranks; an expert of another rank gives zeros and computes
nothing. What depends on the experts is then summed over the ranks. Where the module adds more to it (a residual, a
shared expert), that is counted once: the other ranks take off what the module gives without any expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwise.errors import JobError
from shardwise.parallel.tensor.capture import PLAIN
from shardwise.parallel.tensor.handed import brought_together
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.rows import Nothing, Rows
from shardwise.parallel.tensor.standins import Guarded, Shapes, Silent, enterable, swapped

OWN, NONE, NAN = "own", "none", "nan"  # the experts of a run: this rank's, none, or none with NaN for what they give
MOST = 64  # kinds of calls that a mixture keeps facts of


class Crossing(Protocol):
    """Where values go in and come out; see `crossing.GroupCrossing`."""

    rank: int

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...

    def once(self, x: Tensor) -> Tensor: ...

    def leave(
        self, outputs: Sequence[Tensor], summed: Sequence[bool], tied: Sequence[Tensor], idle: Any
    ) -> list[Any]: ...


class Facts(NamedTuple):
    """Of one kind of call: which leaves of its output depend on the experts, whether those have more in them, and the
    children that are given what depends on the experts."""

    summed: tuple[bool, ...]
    rest: bool
    inside: frozenset[str]


class Part(NamedTuple):
    """This rank's terms of a call's output, what entered, and the tables that only other ranks used."""

    leaves: list[Any]
    tree: Any
    facts: Facts
    tied: list[Tensor]
    idle: list[Tensor]


class Mixture:
    """`module`, of which this rank has the rows of `tables` (parameters of its own) and, of the modules inside of it
    called `experts`, those that are this rank's. Its forward is replaced while open."""

    def __init__(
        self, module: nn.Module, tables: Mapping[str, Owned], experts: Mapping[str, int], crossing: Crossing
    ) -> None:
        self.module, self.crossing = module, crossing
        self._tables, self._experts = dict(tables), dict(experts)
        self._children = dict(children_of(module, "", experts))
        mine = [name for name, rank in experts.items() if rank == crossing.rank]
        self._shapes = Shapes(module.get_submodule(mine[0])) if mine else None
        self._facts: dict[Any, Facts] = {}
        self._own: Any = None
        self._forward = module.forward
        self._dissolved = False

    def open(self) -> None:
        """Run by experts from now on."""
        self._own = vars(self.module).get("forward")
        self._forward = self.module.forward
        self.module.forward = self

    def close(self) -> None:
        """The module's own forward is back."""
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def dissolve(self) -> None:
        """Every expert is here again."""
        self._dissolved = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module runs its own forward."""
        return copy.deepcopy(self._forward, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._dissolved:
            return self._forward(*args, **kwargs)
        part = self.part(*brought_together((args, kwargs)))
        # what is the same on all ranks and has no gradient stays as it is
        through = [
            index
            for index, (leaf, summed) in enumerate(zip(part.leaves, part.facts.summed, strict=True))
            if summed or (isinstance(leaf, Tensor) and leaf.requires_grad)
        ]
        if not through:
            return tree_unflatten(part.leaves, part.tree)
        summed = [part.facts.summed[index] for index in through]
        found = self.crossing.leave([part.leaves[index] for index in through], summed, part.tied, part.idle)
        for index, leaf in zip(through, found, strict=True):
            part.leaves[index] = leaf
        return tree_unflatten(part.leaves, part.tree)

    def part(self, args: Any, kwargs: Any) -> Part:
        """This rank's terms of what the call returns. Raises JobError for an argument that no rule is for."""
        leaves, tree = tree_flatten((args, kwargs))
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise JobError(
                    f"the mixture of experts {type(self.module).__name__} was given a {type(leaf).__name__}, which "
                    "tensor ranks cannot take apart. Give it tensors and plain values, or keep its experts whole."
                )
        facts = self._looked_up(leaves, tree)
        run = _Run(self, OWN, facts)
        chosen = [index for index, leaf in enumerate(leaves) if enterable(leaf)]
        for index, entered in zip(chosen, run.enter([leaves[i] for i in chosen]), strict=True):
            leaves[index] = entered
        found, out = tree_flatten(run.forward(*tree_unflatten(leaves, tree)))
        if facts.rest and self.crossing.rank:
            base, _ = tree_flatten(run.again(NONE).forward(*tree_unflatten(leaves, tree)))
            found = [one - less if total else one for one, less, total in zip(found, base, facts.summed, strict=True)]
        return Part(found, out, facts, run.tied, run.idle())

    def _looked_up(self, leaves: Sequence[Any], tree: Any) -> Facts:
        plain = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (tree, plain, self.module.training)
        facts = self._facts.get(key)
        if facts is None:
            with torch.no_grad(), _disable_current_modes(), _same_chance(leaves):
                facts, sure = self._look(leaves, tree)
            if sure:
                if len(self._facts) == MOST:
                    self._facts.pop(next(iter(self._facts)))
                self._facts[key] = facts
        return facts

    def _look(self, leaves: Sequence[Any], tree: Any) -> tuple[Facts, bool]:
        """What the call does with its experts, and whether that holds for others of its kind: not where no expert ran.

        It is found from what is whole, so alike on all ranks.
        """
        args, kwargs = tree_unflatten(list(leaves), tree)
        run = _Run(self, NAN, Facts((), False, frozenset()))
        marked, _ = tree_flatten(run.forward(args, kwargs))
        inside = frozenset(run.inside)
        bare, _ = tree_flatten(run.again(NONE, inside).forward(args, kwargs))
        summed = tuple(_has_nan(one) for one in marked)
        sure = any(summed) and not any(_has_nan(one) for one in bare)
        return Facts(summed, any(summed) and self._adds_more(run, inside, leaves, tree, summed), inside), sure

    def _adds_more(
        self, run: _Run, inside: frozenset[str], leaves: Sequence[Any], tree: Any, summed: Sequence[bool]
    ) -> bool:
        """Whether without experts it gives anything but zeros: it is given other numbers, to see."""
        chance = torch.Generator().manual_seed(0)
        args, kwargs = tree_unflatten([_other(leaf, chance) for leaf in leaves], tree)
        try:
            found, _ = tree_flatten(run.again(NONE, inside, chance).forward(args, kwargs))
        except Exception:  # its code refuses such numbers: then it is taken off what it gives
            return True
        if len(found) != len(summed):
            return True
        return any(bool(one.any()) for one, total in zip(found, summed, strict=True) if total)


class _Run:
    """One run of the module's own code, with the experts of `mode`."""

    def __init__(self, mixture: Mixture, mode: str, facts: Facts, replayed: Any = None) -> None:
        self.mixture, self.mode, self.facts = mixture, mode, facts
        self.crossing = mixture.crossing
        self.tied: list[Tensor] = []
        self.inside: set[str] = set()
        self.recorded: dict[str, list[Any]] = {}
        self._replayed: dict[str, Iterator[Any]] | None = replayed
        self._entered: dict[int, Tensor] = {}
        self._rows: list[Rows] = []
        self._silent: list[nn.Module] = []  # experts of other ranks that were called

    def again(self, mode: str, inside: frozenset[str] | None = None, chance: torch.Generator | None = None) -> _Run:
        """Another run, in which the children return what they did (or other numbers, by `chance`)."""
        facts = self.facts if inside is None else self.facts._replace(inside=inside)
        kept = {
            name: iter([tree_map(lambda leaf: _other(leaf, chance), one) if chance else one for one in every])
            for name, every in self.recorded.items()
        }
        run = _Run(self.mixture, mode, facts, kept)
        run._entered, run.tied = self._entered, self.tied
        return run

    def forward(self, args: Any, kwargs: Any) -> Any:
        """The module's output."""
        module = self.mixture.module
        with ExitStack() as stack:
            own = {name: p for name, p in module._parameters.items() if p is not None}
            whole = [name for name in own if name not in self.mixture._tables]
            entered = dict(zip(whole, self.parameters([own[name] for name in whole]), strict=True))
            for name, p in own.items():
                other = entered[name] if name in entered else self._table(name, p)
                stack.enter_context(swapped(module._parameters, name, other))
            for path, rank in self.mixture._experts.items():
                if self.mode != OWN or rank != self.crossing.rank:
                    assert self.mixture._shapes is not None
                    fill = torch.nan if self.mode == NAN else 0.0
                    held, key = _place(module, path)
                    stack.enter_context(swapped(held, key, Silent(held[key], self.mixture._shapes, fill, self._silent)))
            for path, child in self.mixture._children.items():
                stack.enter_context(swapped(*_place(module, path), Guarded(child, path, self)))
            return self.mixture._forward(*args, **kwargs)

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found = self.crossing.enter(tensors)
        self.tied += [one for one in found if one.requires_grad]
        return found

    def parameters(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Whole parameters that this run's own code reads, entered once."""
        if self.mode == NAN:
            return list(given)
        missing = [p for p in given if id(p) not in self._entered]
        for p, one in zip(missing, self.enter(missing), strict=True):
            self._entered[id(p)] = one
        return [self._entered[id(p)] for p in given]

    def child(self, name: str, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of what is no expert: it is the same on all ranks, and computed as outside of the mixture."""
        if name in self.facts.inside:
            return self._within(inner, args, kwargs)
        if self._replayed is not None:
            return next(self._replayed[name])
        if self.mode == NAN:
            if any(_has_nan(leaf) for leaf in tree_flatten((args, kwargs))[0]):
                self.inside.add(name)
            output = inner(*args, **kwargs)
        else:
            args, kwargs = tree_map(lambda leaf: self.crossing.once(leaf) if enterable(leaf) else leaf, (args, kwargs))
            leaves, tree = tree_flatten(inner(*args, **kwargs))
            chosen = [index for index, leaf in enumerate(leaves) if enterable(leaf)]
            for index, entered in zip(chosen, self.enter([leaves[i] for i in chosen]), strict=True):
                leaves[index] = entered
            output = tree_unflatten(leaves, tree)
        self.recorded.setdefault(name, []).append(output)
        return output

    def _within(self, inner: Any, args: Any, kwargs: Any) -> Any:
        """A child that works on this rank's terms: its parameters are this rank's operands."""
        held = [part._parameters for part in inner.modules()]
        places = [(one, key) for one in held for key, p in one.items() if p is not None]
        with ExitStack() as stack:
            for (one, key), entered in zip(places, self.parameters([one[key] for one, key in places]), strict=True):
                stack.enter_context(swapped(one, key, entered))
            return inner(*args, **kwargs)

    def idle(self) -> list[Tensor]:
        """The parameters that were used on other ranks alone, of which those have a gradient."""
        silent = dict.fromkeys(p for expert in self._silent for p in expert.parameters())
        tables = [one.local for one in self._rows if one.uses == {"any"}]
        return [one for one in (*tables, *silent) if one.requires_grad]

    def _table(self, name: str, local: Tensor) -> Tensor:
        ids = self.mixture._tables[name].ids
        if self.mode != OWN:
            return Nothing.of((len(ids), *local.shape[1:]), local, torch.nan if self.mode == NAN else 0.0)
        rows = Rows.of(local, tuple(i for i, rank in enumerate(ids) if rank == self.crossing.rank), len(ids))
        self._rows.append(rows)
        return rows


def children_of(module: nn.Module, prefix: str, experts: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a mixture's code calls beside its experts, by their paths."""
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if child is None or path in experts:
            continue
        if is_list(child) or any(one.startswith(path + ".") for one in experts):
            yield from children_of(child, path + ".", experts)
        else:
            yield path, child


def is_list(module: nn.Module) -> bool:
    """Whether it holds modules and has no forward of its own."""
    return type(module).forward is nn.Module.forward


def _place(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    head, _, key = path.rpartition(".")
    return module.get_submodule(head)._modules, key


def _has_nan(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any())


def _other(leaf: Any, chance: torch.Generator | None) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.randn(leaf.shape, generator=chance, dtype=torch.float32).to(leaf.device, leaf.dtype)


@contextmanager
def _same_chance(leaves: Sequence[Any]) -> Iterator[None]:
    """torch's generators are as they were afterwards."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        yield
