"""Where a module is split over the tensor axis: its blocks, its vocabulary, and the proof of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from shardwise.errors import JobError, SpecError
from shardwise.models.blocks import find_blocks, num_parameters, owner
from shardwise.parallel.tensor.atoms import Conflict, Ids, parts_of
from shardwise.parallel.tensor.capture import Captured, capture
from shardwise.parallel.tensor.mixed import called_children, in_expert, opened
from shardwise.parallel.tensor.mixture_proof import Mixed, Unfit
from shardwise.parallel.tensor.mixtures import find_mixture, may_be_mixture, widened
from shardwise.parallel.tensor.propose import Owned, Proposal, Refused, owned_under, propose
from shardwise.parallel.tensor.prove import TOLERANCE, difference
from shardwise.parallel.tensor.seen import Forward, Seen, Uses, Values, run_once, without_cache
from shardwise.spec.layout import split_of
from shardwise.spec.plan import DIMENSIONS, Plan, Split

ROUNDED = 1e-6  # what norms that compute in float32 add up in another order
LARGE = 0.01  # of all parameters: a smaller table is not worth a collective
FEW = 0.25  # of the largest table's rows: so is one with fewer (positions, kinds)
ROWS = 128  # a rank's, of a table in the proof: its rows are alike
UNTAKEN = "its code looks at numbers, or no rule takes what it does"
UNFIT = (RuntimeError, IndexError, ValueError, TypeError)  # what an operation says to parts that it cannot take
One = TypeVar("One")


class Found(NamedTuple):
    """The splits of a module, and what stays whole: name -> why."""

    splits: dict[str, Split]
    whole: dict[str, str]


def find_splits(
    module: nn.Module,
    batch: Any,
    ranks: int,
    *,
    forward: Forward | None = None,
    asked: Mapping[str, Split] | None = None,
    values: Values | None = None,
    sequence: bool = False,
) -> Found:
    """How `module`, run on a small `batch`, is split over `ranks`; only what has been proven is.

    The module runs once, and is left as it was. `asked` are splits that the user has fixed. `values(name, parameter)`
    gives the values of a parameter where the module has none in memory: then those of one operation, or of one kind
    of block, are there at a time. Raises JobError where nothing can be split, SpecError for a split that was asked for
    and changes what the model computes, and where `sequence` (activations cut along the sequence too) does.
    """
    values = values or (lambda name, parameter: parameter.detach())
    seen = run_once(module, batch, forward, values)
    search = _Search(module, seen, ranks, widened(module, asked or {}), values, sequence=sequence)
    owned = search.all()
    if not owned:
        why = "; ".join(dict.fromkeys(search.whole.values())) or "it has no blocks with linear layers"
        raise JobError(
            f"tensor={ranks}: nothing in this model can be split over {ranks} ranks ({why}). Use the data, shard or "
            "pipeline axis instead."
        )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    kinds = {name: _split(name, cut, ranks, search) for name, cut in owned.items()}
    return Found(patterned(kinds, list(shapes)), {n: why for n, why in search.whole.items() if n not in owned})


class _Search:
    def __init__(
        self,
        module: nn.Module,
        seen: Seen,
        ranks: int,
        asked: Mapping[str, Split],
        values: Values,
        *,
        sequence: bool = False,
    ) -> None:
        self.module, self.seen, self.ranks, self.values, self.sequence = module, seen, ranks, values, sequence
        self.asked, self.asked_whole = asked_of(module, asked, ranks)
        plan = Plan(tensor=ranks, splits=dict(asked))
        experts = {name for name in self.asked if (split := split_of(name, plan)) and split.how == "experts"}
        self.asked_experts = {name: self.asked.pop(name).ids for name in experts}
        self.mixtures: dict[str, Mixed] = {}
        self.by_experts: dict[str, Owned] = {}
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.total = num_parameters([module])
        self.blocks = find_blocks(module)
        self.whole: dict[str, str] = {}
        self.keep = set(self.asked_whole)
        self.wished = set(self.asked_whole)  # parameters that the plan keeps whole
        self.tables: set[str] = set()  # parameters that are cut along a vocabulary
        self.named = {name: split.how for name, split in asked.items() if name in DIMENSIONS}
        self.dimensions: dict[str, str] = {}  # parameter -> which of `DIMENSIONS` is cut
        self._proven: dict[Any, Proposal] = {}
        self._reasons: dict[Any, dict[str, str]] = {}  # of the same, why the others are whole
        self._captures: dict[str, Captured | None] = {}
        self._mixed: dict[Any, Mixed | Unfit | None] = {}

    def all(self) -> dict[str, Owned]:
        """Until what is used in several places is cut alike in all of them."""
        while True:
            found: dict[str, Owned] = {}
            clash: set[str] = set()
            self.whole, self.tables = {}, set()
            self._by_experts()
            inner = list(self._inner())
            units = {*inner, *self._vocabularies(inner)}
            for cuts in (self.by_experts, *(self._of(name) for name in sorted(units))):
                for parameter, cut in cuts.items():
                    if found.setdefault(parameter, cut) != cut:
                        clash.add(parameter)
            clash |= {name for name in found if not self._covered(name, {*units, *self.mixtures})}
            self.wished |= {name for name in found if self.named.get(self._dimension(name)) == "whole"}
            clash |= self.wished & found.keys()
            if lost := sorted(self.asked.keys() - found.keys() | self.asked.keys() & clash):
                raise refused(f"'{lost[0]}': the model uses it in a place that cannot run split")
            if not clash:
                self._check_named(found)
                self._explain(found)
                return found
            self.keep |= clash
            self._proven.clear()

    def _dimension(self, parameter: str) -> str:
        if parameter in self.by_experts:
            return "@experts"
        return "@vocabulary" if parameter in self.tables else self.dimensions[parameter]

    def _check_named(self, found: Mapping[str, Owned]) -> None:
        """Raise SpecError for a dimension that was to be split and is nowhere."""
        for name, how in self.named.items():
            if how == "split" and not any(self._dimension(one) == name for one in found):
                raise refused(f"'{name}': nothing of this dimension can be split here")

    def _by_experts(self) -> None:
        """Find the mixtures of experts, and their cuts by the names of the whole model."""
        self.mixtures = {}
        found: dict[str, Owned] = {}
        self.by_experts = found
        for name in sorted(self.seen.calls, key=lambda name: name.count(".") + bool(name)):
            if in_expert(name, self._experts()):
                continue
            inside = {n: self.names[id(p)] for n, p in self.module.get_submodule(name).named_parameters()}
            mixed = self._mixture(name, inside)
            if isinstance(mixed, Mixed):
                self.mixtures[name] = mixed
                found |= {inside[n]: cut for n, cut in mixed.cuts(self.module.get_submodule(name)).items()}
        if lost := sorted(self.asked_experts.keys() - found.keys()):
            raise refused(f"'{lost[0]}': {self.whole.get(lost[0], 'it belongs to no mixture of experts')}")

    def _mixture(self, name: str, inside: Mapping[str, str]) -> Mixed | Unfit | None:
        keep = frozenset(n for n, outer in inside.items() if outer in self.keep or outer in self.asked)
        key = (name, keep)
        if key not in self._mixed:
            asked = {n: self.asked_experts[outer] for n, outer in inside.items() if outer in self.asked_experts}
            self._mixed[key] = self._find_mixture(name, keep, asked)
        found = self._mixed[key]
        if isinstance(found, Unfit):
            self.whole |= {inside[n]: str(found) for n in found.names}
        return found

    def _find_mixture(self, name: str, keep: frozenset[str], asked: Mapping[str, Ids]) -> Mixed | Unfit | None:
        part = self.module.get_submodule(name)
        with without_cache(part), Uses(self.names, self.values):  # a list of blocks is none, and too large for a twin
            if not may_be_mixture(part, *self.seen.calls[name], self.ranks, keep):
                return None
        twin, args, kwargs = self._twin(name, None)
        try:
            with without_cache(part):
                return find_mixture(twin, args, kwargs, self.ranks, keep=keep, asked=asked)
        except Unfit as why_not:
            return why_not

    def _experts(self) -> dict[str, dict[str, int]]:
        return {name: mixed.experts for name, mixed in self.mixtures.items()}

    def _inner(self) -> Iterator[str]:
        """The blocks; where there are none, the smallest modules that can be split by themselves."""
        blocks = [name for name in self.blocks if not in_expert(name, self._experts())]
        for name in blocks:
            yield from self._splittable(name)
        if not blocks:
            yield from self._smallest("")

    def _splittable(self, name: str) -> Iterator[str]:
        """`name`, or what is inside of it that can be captured."""
        inside = opened(self.module, name, self._experts())
        if inside is not None:
            for one in inside:
                yield from self._splittable(one) if one in self.seen.calls and self._beside(name, one) else ()
            return
        if name in self.seen.calls and self._captured(name) is not None:
            yield name
            return
        part = self.module.get_submodule(name)  # experts that stay whole are in a list too
        apart = any(isinstance(one, Unfit) for (unfit, _), one in self._mixed.items() if unfit == name)
        for child, _ in part.named_children() if apart else called_children(part):
            yield from self._splittable(f"{name}.{child}") if f"{name}.{child}" in self.seen.calls else ()

    def _beside(self, name: str, child: str) -> bool:
        """Whether a child of a mixture may be split by itself: it is no single layer, such as the router, and has no
        part in what the experts give."""
        if name not in self.mixtures:
            return True
        part = self.module.get_submodule(child)
        return any(True for _ in part.children()) and child.removeprefix(f"{name}.") not in self.mixtures[name].inside

    def _smallest(self, name: str) -> list[str]:
        """Of a module and those inside of it, what together has most that can be cut."""
        found: list[str] = []
        for child, part in self.module.get_submodule(name).named_children():
            inner = f"{name}.{child}" if name else child
            if not any(True for _ in part.children()) or in_expert(inner, self._experts()):
                continue
            below = self._smallest(inner)
            alone = inner in self.seen.calls and opened(self.module, inner, self._experts()) is None
            own = alone and self._gain([inner]) > self._gain(below)
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
        outside = {n: m for n, m in outside.items() if not in_expert(n, self._experts())}
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
        self.whole |= dict.fromkeys(self.wished, "the plan keeps it whole")
        for name, p in self.module.named_parameters():
            if p.dim() > 1 and name not in found and owner(name, self.blocks) is not None:
                layer = self.module.get_submodule(name.rpartition(".")[0])
                why = "convolutions are cut channel by channel only" if isinstance(layer, _ConvNd) else UNTAKEN
                self.whole.setdefault(name, why)

    def _large(self, parameter: Tensor) -> bool:
        return parameter.numel() >= LARGE * self.total and parameter.shape[0] >= self.ranks

    def _captured(self, name: str) -> Captured | None:
        if name not in self._captures:
            args, kwargs = self.seen.calls[name]
            self._captures[name] = capture(self.module.get_submodule(name), args, kwargs)
        return self._captures[name]

    def _of(self, name: str) -> dict[str, Owned]:
        """The proven cuts of one module, by the names of the whole model."""
        captured = self._captured(name)
        inside = {n: self.names[id(p)] for n, p in self.module.get_submodule(name).named_parameters()}
        if captured is None:
            self.whole |= dict.fromkeys(inside.values(), "its code looks at numbers")
            return {}
        keep = frozenset(n for n, outer in inside.items() if outer in self.keep)
        forced = {n: self.asked[outer] for n, outer in inside.items() if outer in self.asked}
        key = (_text(captured), keep, str(forced))
        if key not in self._proven:
            self._proven[key] = self._prove(name, captured, keep, inside, forced)
            self._reasons[key] = {n: self.whole[outer] for n, outer in inside.items() if outer in self.whole}
        proven = self._proven[key]
        self.whole |= {inside[n]: why for n, why in self._reasons[key].items()}
        self.dimensions |= {inside[n]: dimension for n, dimension in proven.dimensions.items()}
        return {inside[n]: cut for n, cut in proven.owned.items()}

    def _prove(
        self, name: str, captured: Captured, keep: frozenset[str], inside: dict[str, str], forced: dict[str, Owned]
    ) -> Proposal:
        module = self.module.get_submodule(name)
        rows = {f"{n}.weight".lstrip(".") for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
        candidates = {n for n, outer in inside.items() if outer in self.tables or n not in rows or n in forced}

        def proposed(captured: Captured) -> Proposal:
            return propose(captured, self.ranks, candidates=candidates, keep=keep, forced=forced)

        try:
            proposal = proposed(captured)
            self.whole |= {inside[n]: why for n, why in proposal.whole.items()}
            if not proposal.owned:
                return proposal
            few = self._few_rows(module) if not forced and self.tables.issuperset(inside.values()) else None
            twin, args, kwargs = self._twin(name, few)
            again = capture(twin, args, kwargs)
            if again is None:
                self.whole |= dict.fromkeys((inside[n] for n in proposal.owned), "its code does not run in float64")
                return Proposal({}, {})
            owned = proposed(again).owned if few else proposal.owned
            why = self._proof(twin, args, kwargs, again, owned)
        except Refused as why_not:
            raise refused(f"'{inside[why_not.name]}': {why_not}") from None
        alike = [(n, one.dim) for n, one in owned.items()] == [(n, one.dim) for n, one in proposal.owned.items()]
        if not why and alike:
            return proposal
        why = why or "in float64 it computes something else"
        if forced:
            raise refused(f"'{inside[next(iter(forced))]}': {why}")
        return self._without(name, captured, keep, inside, proposal, why)

    def _proof(self, twin: nn.Module, args: Any, kwargs: Any, captured: Captured, owned: Mapping[str, Owned]) -> str:
        """Why the split does not do; empty where it computes the same."""
        try:
            gap, where = difference(twin, args, kwargs, captured, owned, self.ranks)
            if not gap <= (ROUNDED if _in_singles(captured) else TOLERANCE):
                return f"split, its {where} differs by {gap:.1e}"
            if self.sequence:
                _prove_sequence(*difference(twin, args, kwargs, captured, owned, self.ranks, sequence=True))
        except (Conflict, *UNFIT) as failed:
            return f"split, its parts do not fit together ({failed})"
        return ""

    def _without(
        self, name: str, captured: Captured, keep: frozenset[str], inside: dict[str, str], proposal: Proposal, why: str
    ) -> Proposal:
        """What of a split that failed can be proven: that of each part by itself, such as attention and an MLP."""
        every = frozenset().union(*proposal.regions)
        bad = every
        if len(proposal.regions) > 1:
            alone = [(one, self._prove(name, captured, keep | (every - one), inside, {})) for one in proposal.regions]
            bad = every - frozenset().union(*(one for one, proven in alone if proven.owned))
        found = self._prove(name, captured, keep | bad, inside, {}) if bad < every and bad else Proposal({}, {})
        self.whole |= dict.fromkeys((inside[n] for n in (bad or every)), why)
        return found

    def _few_rows(self, module: nn.Module) -> int | None:
        """How many rows of a table or of what scores it are enough for the proof, if not all."""
        kinds = {name for name, _ in module.named_parameters()}
        count = module.weight.shape[0] if kinds <= {"weight", "bias"} and isinstance(module.weight, Tensor) else 0
        few = ROWS * self.ranks + count % self.ranks
        return few if count > few else None

    def _twin(self, name: str, few: int | None) -> tuple[nn.Module, Any, Any]:
        """A copy of one module and of the arguments of its call in float64, with `few` rows of a table."""
        module = self.module.get_submodule(name)
        memo: dict[int, Any] = {}
        for p in module.parameters():
            made = self.values(self.names[id(p)], p)
            made = made if few is None else made[:few]
            memo[id(p)] = nn.Parameter(made.double(), requires_grad=p.requires_grad)
        twin = copy.deepcopy(module, memo)
        for part in twin.modules():
            part._buffers = {n: _double(b) for n, b in part._buffers.items()}
        args, kwargs = tree_map(_double, self.seen.calls[name])
        if few is not None:
            for size in ("num_embeddings", "out_features"):
                if hasattr(twin, size):
                    setattr(twin, size, few)
            if (padding := getattr(twin, "padding_idx", None)) is not None:
                twin.padding_idx = min(padding, few - 1)
            if isinstance(module, nn.Embedding):
                args, kwargs = tree_map(lambda leaf: leaf % few if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return twin, args, kwargs

    def _covered(self, parameter: str, units: set[str]) -> bool:
        """Whether every use of a parameter is in a module that is run split."""
        return all(any(name in units for name in stack) for stack in self.seen.users.get(parameter, ()))


def asked_of(module: nn.Module, asked: Mapping[str, Split], ranks: int) -> tuple[dict[str, Owned], set[str]]:
    """The parameters that the user wants cut (without ids where no parts are given: then those that fit are found), and
    those that are to stay whole. Raises SpecError for a pattern that
    matches nothing and for parts that do not fit."""
    asked = {pattern: split for pattern, split in asked.items() if pattern not in DIMENSIONS}
    plan = Plan(tensor=ranks, splits=asked)
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


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _in_singles(captured: Captured) -> bool:
    """Whether a module computes in float32 though all it has is float64: then its sums are rounded."""
    values = [node.meta["val"] for node in captured.graph.nodes if node.op == "call_function"]
    return any(isinstance(one, Tensor) and one.dtype == torch.float32 for one in values)


def _text(captured: Captured) -> str:
    """What two graphs that are alike have in common: operations, shapes and names."""
    lines = [f"{name} {node.meta['val'].shape}" for name, node in zip(captured.names, captured.inputs, strict=False)]
    return "\n".join([*lines, str(captured.graph)])


def _split(name: str, cut: Owned, ranks: int, search: _Search) -> Split:
    how = "vocabulary" if name in search.tables and cut.dim == 0 else "row" if cut.dim else "column"
    how = "experts" if name in search.by_experts else how
    size = -(-len(cut.ids) // ranks)
    equal = cut.ids == tuple(index // size for index in range(len(cut.ids)))
    return Split(how=how, parts=() if equal else parts_of(cut.ids, ranks))  # type: ignore[arg-type]


def patterned(splits: Mapping[str, One], names: Sequence[str]) -> dict[str, One]:
    """The same with blocks' numbers as `*` (else the first of them), where that says the same of every parameter."""
    short: dict[str, One] = {}
    for name, split in splits.items():
        for most in range(name.count("."), -1, -1):
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=most) if most else name
            if all(splits.get(one) == split for one in names if fnmatchcase(one, pattern)):
                break
        short[pattern] = split
    return short
