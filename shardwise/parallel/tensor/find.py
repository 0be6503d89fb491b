"""Where a module is split over the tensor axis: its blocks, its vocabulary, and the proof of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from shardwise.errors import JobError, SpecError
from shardwise.models.blocks import find_blocks, num_parameters, owner
from shardwise.models.inputs import call
from shardwise.parallel.tensor.atoms import parts_of
from shardwise.parallel.tensor.capture import Captured, capture
from shardwise.parallel.tensor.guards import python_draws
from shardwise.parallel.tensor.propose import Owned, Refused, owned_under, propose
from shardwise.parallel.tensor.prove import TOLERANCE, difference
from shardwise.spec.layout import split_of
from shardwise.spec.plan import Plan, Split

ROUNDED = 1e-6  # what norms that compute in float32 add up in another order
LARGE = 0.01  # of all parameters: a smaller table is not worth a collective
FEW = 0.25  # of the largest table's rows: so is one with fewer (positions, kinds)
Forward = Callable[[nn.Module, Any], Any]


class Found(NamedTuple):
    """The splits of a module, and what stays whole: name -> why."""

    splits: dict[str, Split]
    whole: dict[str, str]


class Seen(NamedTuple):
    """One run: the arguments of each module's first call, and in which modules each parameter is used."""

    calls: dict[str, tuple[Any, Any]]
    users: dict[str, set[tuple[str, ...]]]


def find_splits(
    module: nn.Module,
    batch: Any,
    ranks: int,
    *,
    forward: Forward | None = None,
    asked: Mapping[str, Split] | None = None,
    sequence: bool = False,
) -> Found:
    """How `module`, run on a small `batch`, is split over `ranks`; only what has been proven is.

    The module runs once, and is left as it was. `asked` are splits that the user has fixed. Raises JobError where
    nothing can be split, SpecError for a split that was asked for and changes what the model computes, and where
    `sequence` (activations cut along the sequence too) does.
    """
    seen = _run(module, batch, forward)
    search = _Search(module, seen, ranks, asked or {}, sequence=sequence)
    owned = search.all()
    if not owned:
        why = "; ".join(dict.fromkeys(search.whole.values())) or "it has no blocks with linear layers"
        raise JobError(
            f"tensor={ranks}: nothing in this model can be split over {ranks} ranks ({why}). Use the data, shard or "
            "pipeline axis instead."
        )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    kinds = {name: _split(name, cut, ranks, search.tables) for name, cut in owned.items()}
    return Found(_patterns(kinds, list(shapes)), {n: why for n, why in search.whole.items() if n not in owned})


class _Search:
    def __init__(
        self, module: nn.Module, seen: Seen, ranks: int, asked: Mapping[str, Split], *, sequence: bool
    ) -> None:
        self.module, self.seen, self.ranks, self.sequence = module, seen, ranks, sequence
        self.asked, self.asked_whole = asked_of(module, asked, ranks)
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.total = num_parameters([module])
        self.blocks = find_blocks(module)
        self.whole: dict[str, str] = {}
        self.keep = set(self.asked_whole)
        self.tables: set[str] = set()  # parameters that are cut along a vocabulary
        self._proven: dict[Any, dict[str, Owned]] = {}

    def all(self) -> dict[str, Owned]:
        """Until what is used in several places is cut alike in all of them."""
        while True:
            found: dict[str, Owned] = {}
            clash: set[str] = set()
            self.whole, self.tables = {}, set()
            inner = list(self._inner())
            units = {*inner, *self._vocabularies(inner)}
            for name in sorted(units):
                for parameter, cut in self._of(name).items():
                    if found.setdefault(parameter, cut) != cut:
                        clash.add(parameter)
            clash |= {name for name in found if not self._covered(name, units)}
            if lost := sorted(self.asked.keys() - found.keys() | self.asked.keys() & clash):
                raise refused(f"'{lost[0]}': the model uses it in a place that cannot run split")
            if not clash:
                self._explain(found)
                return found
            self.keep |= clash
            self._proven.clear()

    def _inner(self) -> Iterator[str]:
        """The blocks; where there are none, the smallest modules that can be split by themselves."""
        for name in self.seen.calls:
            if name in self.blocks:
                yield from self._splittable(name)
        if not self.blocks:
            yield from self._smallest("")

    def _splittable(self, name: str) -> Iterator[str]:
        """`name`, or what is inside of it that can be captured."""
        if name not in self.seen.calls or self._captured(name) is not None:
            yield name
            return
        for child, _ in self.module.get_submodule(name).named_children():
            yield from self._splittable(f"{name}.{child}") if f"{name}.{child}" in self.seen.calls else ()

    def _smallest(self, name: str) -> list[str]:
        """Of a module and those inside of it, what together has most that can be cut."""
        found: list[str] = []
        for child, part in self.module.get_submodule(name).named_children():
            inner = f"{name}.{child}" if name else child
            if not any(True for _ in part.children()):
                continue
            below = self._smallest(inner)
            own = inner in self.seen.calls and self._gain([inner]) > self._gain(below)
            found += [inner] if own else below
        return found

    def _gain(self, names: Sequence[str]) -> int:
        """How many elements are in the parameters that can be cut there."""
        sizes = {name: p.numel() for name, p in self.module.named_parameters()}
        return sum(sizes[one] for one in {one for name in names for one in self._of(name)})

    def _vocabularies(self, inner: Sequence[str]) -> list[str]:
        """Large embeddings outside of what is split otherwise, and the linear layers that score their rows."""
        outside = {n: m for n, m in self.module.named_modules() if n in self.seen.calls and owner(n, inner) is None}
        outside = {n: m for n, m in outside.items() if owner(n, self.blocks) is None}
        tables = {n: m for n, m in outside.items() if isinstance(m, nn.Embedding) and self._large(m.weight)}
        most = max((m.num_embeddings for m in tables.values()), default=0)
        tables = {n: m for n, m in tables.items() if m.num_embeddings >= FEW * most}
        sizes = {m.num_embeddings for m in tables.values()}
        heads = {n: m for n, m in outside.items() if isinstance(m, nn.Linear) and m.out_features in sizes}
        for part in (*tables.values(), *heads.values()):
            self.tables |= {self.names[id(p)] for p in part.parameters()}
        return [*tables, *heads]

    def _explain(self, found: Mapping[str, Owned]) -> None:
        """Say of every matrix of the blocks that is not split why."""
        for name, p in self.module.named_parameters():
            if p.dim() > 1 and name not in found and owner(name, self.blocks) is not None:
                self.whole.setdefault(name, "its code looks at numbers, or no rule takes what it does")

    def _large(self, parameter: Tensor) -> bool:
        return parameter.numel() >= LARGE * self.total and parameter.shape[0] >= self.ranks

    def _captured(self, name: str) -> Captured | None:
        args, kwargs = self.seen.calls[name]
        return capture(self.module.get_submodule(name), args, kwargs)

    def _of(self, name: str) -> dict[str, Owned]:
        """The proven cuts of one module, by the names of the whole model."""
        module = self.module.get_submodule(name)
        twin = copy.deepcopy(module).double()
        args, kwargs = tree_map(_double, self.seen.calls[name])
        captured = capture(twin, args, kwargs)
        inside = {n: self.names[id(p)] for n, p in module.named_parameters()}
        if captured is None:
            self.whole |= dict.fromkeys(inside.values(), "its code looks at numbers")
            return {}
        keep = frozenset(n for n, outer in inside.items() if outer in self.keep)
        forced = {n: self.asked[outer] for n, outer in inside.items() if outer in self.asked}
        key = (_text(captured), keep, str(forced))
        if key not in self._proven:
            self._proven[key] = self._prove(twin, args, kwargs, captured, keep, inside, forced)
        return {inside[n]: cut for n, cut in self._proven[key].items()}

    def _prove(
        self,
        twin: nn.Module,
        args: Any,
        kwargs: Any,
        captured: Captured,
        keep: frozenset[str],
        inside: dict[str, str],
        forced: dict[str, Owned],
    ) -> dict[str, Owned]:
        rows = {f"{n}.weight".lstrip(".") for n, m in twin.named_modules() if isinstance(m, nn.Embedding)}
        candidates = {n for n, outer in inside.items() if outer in self.tables or n not in rows or n in forced}
        try:
            proposal = propose(captured, self.ranks, candidates=candidates, keep=keep, forced=forced)
        except Refused as why_not:
            raise refused(f"'{inside[why_not.name]}': {why_not}") from None
        self.whole |= {inside[n]: why for n, why in proposal.whole.items()}
        if not proposal.owned:
            return {}
        gap, where = difference(twin, args, kwargs, captured, proposal.owned, self.ranks)
        if gap <= TOLERANCE:
            if self.sequence:
                _prove_sequence(*difference(twin, args, kwargs, captured, proposal.owned, self.ranks, sequence=True))
            return proposal.owned
        why = f"split, its {where} differs by {gap:.1e}"
        if forced:
            raise refused(f"'{inside[next(iter(forced))]}': {why}")
        self.whole |= dict.fromkeys((inside[n] for n in proposal.owned), why)
        return {}

    def _covered(self, parameter: str, units: set[str]) -> bool:
        """Whether every use of a parameter is in a module that is run split."""
        return all(any(name in units for name in stack) for stack in self.seen.users.get(parameter, ()))


def asked_of(module: nn.Module, asked: Mapping[str, Split], ranks: int) -> tuple[dict[str, Owned], set[str]]:
    """The parameters that the user wants cut (without ids where no parts are given: then those that fit are found), and
    those that are to stay whole. Raises SpecError for a pattern that
    matches nothing and for parts that do not fit."""
    plan = Plan(tensor=ranks, splits=dict(asked))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for pattern in asked:
        alone = Plan(tensor=ranks, splits={pattern: asked[pattern]})
        if not any(split_of(name, alone) for name in shapes):
            raise SpecError(
                f"splits of the plan has '{pattern}', which matches no parameter and no layer of the model."
            )
    whole = {name for name in shapes if (split := split_of(name, plan)) is not None and split.how == "whole"}
    cuts = owned_under(shapes, plan)
    free = {name for name in cuts if (split := split_of(name, plan)) is not None and not split.parts}
    return {name: cut._replace(ids=()) if name in free else cut for name, cut in cuts.items()}, whole


def _prove_sequence(gap: float, where: str) -> None:
    if not gap <= ROUNDED:
        raise SpecError(
            f"sequence=true changes what the model computes: cut along the sequence, the {where} of a block differs by "
            f"{gap:.1e}. Use sequence=false."
        )


def refused(why: str) -> SpecError:
    return SpecError(f"splits of the plan: {why}. Leave it out, and the split is found from the model itself.")


class _Uses(TorchFunctionMode):
    """Notes in which modules each parameter is an operand."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.stack = names, [""]
        self.users: dict[str, set[tuple[str, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__" or isinstance(found, Tensor):  # its shape is no use, `.T` is
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self.names:
                    self.users.setdefault(self.names[id(leaf)], set()).add(tuple(self.stack))
        return found


def _run(module: nn.Module, batch: Any, forward: Forward | None) -> Seen:
    calls: dict[str, tuple[Any, Any]] = {}
    uses = _Uses({id(p): name for name, p in module.named_parameters()})

    def enter(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        uses.stack.append(name)
        calls.setdefault(name, tree_map(_kept, (args, kwargs)))

    def leave(name: str, *_: Any) -> None:
        uses.stack.pop()

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    training = module.training
    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(partial(leave, name)).remove)
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(python_draws())
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_cache(module))
        stack.enter_context(uses)
        call(module.train(), batch, forward)
    module.train(training)
    for name, buffer in module.named_buffers():
        if name in before:
            buffer.copy_(before[name])
    return Seen(calls, uses.users)


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """Models of transformers hand a cache of keys through their blocks, which training does not read."""
    told = [c for c in {id(c): c for c in configurations(module)}.values() if getattr(c, "use_cache", False)]
    for one in told:
        one.use_cache = False
    try:
        yield
    finally:
        for one in told:
            one.use_cache = True


def configurations(module: nn.Module) -> Iterator[Any]:
    """What models of transformers are configured with."""
    for part in module.modules():
        if (config := getattr(part, "config", None)) is not None and not isinstance(config, nn.Module):
            yield config


def _kept(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _text(captured: Captured) -> str:
    """What two graphs that are alike have in common: operations, shapes and names."""
    lines = [f"{name} {node.meta['val'].shape}" for name, node in zip(captured.names, captured.inputs, strict=False)]
    return "\n".join([*lines, str(captured.graph)])


def _split(name: str, cut: Owned, ranks: int, tables: set[str]) -> Split:
    how = "vocabulary" if name in tables and cut.dim == 0 else "row" if cut.dim else "column"
    size = -(-len(cut.ids) // ranks)
    equal = cut.ids == tuple(index // size for index in range(len(cut.ids)))
    return Split(how=how, parts=() if equal else parts_of(cut.ids, ranks))  # type: ignore[arg-type]


def _patterns(splits: Mapping[str, Split], names: Sequence[str]) -> dict[str, Split]:
    """The same with blocks' numbers as `*`, where that says the same of every parameter."""
    short: dict[str, Split] = {}
    for name, split in splits.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        matched = [one for one in names if fnmatchcase(one, pattern)]
        good = all(splits.get(one) == split for one in matched)
        short[pattern if good else name] = split
    return short
