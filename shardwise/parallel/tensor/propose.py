"""Looks for a split of a graph: which parameters are cut, along which dim, and what must stay on one rank.

Every layer whose input is whole begins with its outputs cut into atoms. Going on through the graph joins atoms (the
indices of a head, a key's head with its queries') until a layer sums over the cut dim, where the graph is whole again.
Where an operation has no rule, another way is tried, and at last the layers that led there stay whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import fx

from shardwise.parallel.tensor.atoms import Atoms, Conflict, Cut, Ids, deal
from shardwise.parallel.tensor.capture import Captured
from shardwise.parallel.tensor.elementwise import step_of
from shardwise.parallel.tensor.step import Step, View, shape
from shardwise.spec.layout import tensor_spans
from shardwise.spec.plan import Plan

TRIES = 400
SAME = ("to", "t", "numpy_T", "transpose", "detach", "alias")  # of a matrix, all of it
CARRY = (*SAME, "split", "chunk", "split_with_sizes", "slice")


class Owned(NamedTuple):
    """A parameter is cut along `dim` (0 or 1); `ids` are the ranks of its indices."""

    dim: int
    ids: Ids


class Proposal(NamedTuple):
    """Parameter -> how it is cut, why others are whole, which dimension is cut (`@heads` or `@hidden`), and which are
    cut together."""

    owned: dict[str, Owned]
    whole: dict[str, str]
    dimensions: dict[str, str] = {}
    regions: tuple[frozenset[str], ...] = ()


class Refused(Exception):
    """What was asked for the parameter `name` cannot be."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


class _Failed(Exception):
    def __init__(self, why: str, sources: frozenset[str]) -> None:
        super().__init__(why)
        self.sources = sources


class _Looking(View):
    """Atoms, and the choices that were made."""

    def __init__(self, captured: Captured, ranks: int, search: _Search) -> None:
        self.atoms = Atoms()
        super().__init__(self.atoms, ranks, {})
        self.search = search
        self.params = dict(zip(captured.inputs, captured.names, strict=False))
        self.sources: dict[fx.Node, frozenset[str]] = {}
        self.uses: dict[str, list[Cut | None]] = {}
        self.dimensions: dict[str, str] = {}
        self.regions: tuple[frozenset[str], ...] = ()
        self.here: frozenset[str] = frozenset()  # the sources of the operation that is looked at
        self.asked: list[tuple[fx.Node, int, frozenset[str]]] = []

    def column(self, weight: fx.Node, dim: int) -> Ids | None:
        origin = _origin(weight, dim)
        if origin is None or origin[0] not in self.params:
            return None
        name = self.params[origin[0]]
        if name not in self.search.columns and self.search.may(name) and shape(origin[0])[origin[1]] >= self.ranks:
            self.search.columns[name] = origin[1]
            raise _Again
        return None

    def choose(self, node: fx.Node, options: int) -> int:
        taken = min(self.search.choices.get(node, 0), options - 1)
        self.asked.append((node, options, self.here))
        return taken


class _Again(Exception):
    pass


class _Search:
    def __init__(
        self,
        captured: Captured,
        ranks: int,
        keep: Collection[str],
        candidates: Collection[str],
        forced: Mapping[str, Owned],
    ) -> None:
        self.captured, self.ranks = captured, ranks
        self.candidates, self.forced = candidates, forced
        self.keep = frozenset(keep)
        self.whole: dict[str, str] = dict.fromkeys(keep, "it is used elsewhere too")  # these begin no cut
        self.columns = {name: one.dim for name, one in forced.items()}
        self.choices: dict[fx.Node, int] = {}
        self.why: dict[str, str] = {}  # parameter -> what stopped it first, before other ways were tried

    def may(self, name: str) -> bool:
        return name in self.candidates and name not in self.whole

    def run(self) -> Proposal:
        for _ in range(TRIES):
            looking = _Looking(self.captured, self.ranks, self)
            try:
                self._through(looking)
                owned = self._deal(looking)
            except _Again:
                continue
            except _Failed as failed:
                self._give_way(looking, failed)
                continue
            whole = {name: why for name, why in self.whole.items() if name not in owned}
            return Proposal(owned, whole, looking.dimensions, looking.regions)
        return Proposal({}, {**self.whole, **dict.fromkeys(self.columns, "no way was found in time")})

    def _through(self, looking: _Looking) -> None:
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                self._begin(looking, node)
            elif node.op == "call_function":
                self._one(looking, node)

    def _begin(self, looking: _Looking, node: fx.Node) -> None:
        name = looking.params.get(node)
        if name in self.columns and name not in self.whole:
            dim = self.columns[name]
            looking.states[node] = Cut(dim, looking.atoms.fresh(shape(node)[dim]))
            looking.sources[node] = frozenset([name])

    def _one(self, looking: _Looking, node: fx.Node) -> None:
        sources = frozenset().union(*(looking.sources.get(one, frozenset()) for one in node.all_input_nodes))
        looking.here = sources
        try:
            step = step_of(looking, node)
        except Conflict as conflict:
            raise _Failed(f"{_word(node)}: {conflict}", sources) from None
        looking.states[node] = step.out
        if step.local and not step.reduce:
            looking.sources[node] = sources
        self._note(looking, node, step)

    def _note(self, looking: _Looking, node: fx.Node, step: Step) -> None:
        """What a use makes of the parameters among its operands."""
        if _word(node) in SAME and _origin(node, 0) is not None:
            return  # what counts is who uses the result
        for one in node.all_input_nodes:
            cut = looking.states.get(one) or step.wants.get(one)
            dim = cut.dim if isinstance(cut, Cut) else 0
            origin = (one, dim) if one in looking.params else _origin(one, dim, SAME)
            if origin is None or origin[0] not in looking.params:
                continue
            use = cut._replace(dim=origin[1]) if isinstance(cut, Cut) else None
            looking.uses.setdefault(looking.params[origin[0]], []).append(use)

    def _deal(self, looking: _Looking) -> dict[str, Owned]:
        """Atoms to ranks, region by region; a region that has fewer atoms than ranks cannot be cut."""
        cuts = self._stored(looking)
        region = _regions(looking.atoms, {name: cut.ids for name, cut in cuts.items()})
        looking.regions = tuple(map(frozenset, region))
        owner: dict[int, int] = {}
        for names in region:
            groups = len({one for name in names for one in looking.atoms.resolve(cuts[name].ids)})
            grouped = groups < min(len(cuts[name].ids) for name in names)
            looking.dimensions |= dict.fromkeys(names, "@heads" if grouped else "@hidden")
            if any(name in self.forced and self.forced[name].ids for name in names):
                owner |= self._forced(looking, names, cuts)
                continue
            longest = max(names, key=lambda name: len(cuts[name].ids))
            classes = list(dict.fromkeys(looking.atoms.resolve(cuts[longest].ids)))
            if len(classes) < self.ranks:
                sources = [name for name in names if name in self.columns]
                least = min(len(cuts[name].ids) for name in sources)
                why = f"{len(classes)} heads or parts on {self.ranks} ranks"
                raise _Failed(why, frozenset(n for n in sources if len(cuts[n].ids) == least))
            owner |= deal(classes, self.ranks)
        found = {}
        for name, cut in cuts.items():
            found[name] = Owned(cut.dim, tuple(owner[one] for one in looking.atoms.resolve(cut.ids)))
        return found

    def _forced(self, looking: _Looking, names: Sequence[str], cuts: Mapping[str, Cut]) -> dict[int, int]:
        """Atoms to ranks as it was asked for; the others of the region evenly."""
        owner: dict[int, int] = {}
        for name in names:
            if name in self.forced and self.forced[name].ids:
                for atom, rank in zip(looking.atoms.resolve(cuts[name].ids), self.forced[name].ids, strict=True):
                    if owner.setdefault(atom, rank) != rank:
                        raise Refused(name, "it cuts what must stay on one rank, such as a head")
        rest = [one for name in names for one in looking.atoms.resolve(cuts[name].ids) if one not in owner]
        return deal(list(dict.fromkeys(rest)), self.ranks) | owner

    def _stored(self, looking: _Looking) -> dict[str, Cut]:
        """The parameters of which every use takes the same part."""
        found: dict[str, Cut] = {}
        for name, uses in looking.uses.items():
            first = uses[0]
            if first is None or first.dim > 1 or name in self.keep or name not in self.candidates:
                continue
            if name in self.forced or all(
                use is not None and use.dim == first.dim and looking.atoms.alike(use.ids, first.ids) for use in uses
            ):
                found[name] = first
        return found

    def _give_way(self, looking: _Looking, failed: _Failed) -> None:
        for name in failed.sources:
            self.why.setdefault(name, str(failed))
        asked = [(node, options) for node, options, sources in looking.asked if sources & failed.sources]
        for index in reversed(range(len(asked))):
            node, options = asked[index]
            if self.choices.get(node, 0) + 1 < options:
                self.choices[node] = self.choices.get(node, 0) + 1
                for later, _ in asked[index + 1 :]:
                    self.choices.pop(later, None)
                return
        for node, _ in asked:
            self.choices.pop(node, None)
        if asked_for := sorted(failed.sources & self.forced.keys()):
            raise Refused(asked_for[0], self.why[asked_for[0]])
        for name in failed.sources:
            self.columns.pop(name, None)
            self.whole[name] = self.why[name]
        if not failed.sources:  # what no parameter led to
            raise AssertionError(str(failed))


def propose(
    captured: Captured,
    ranks: int,
    *,
    candidates: Collection[str],
    keep: Collection[str] = (),
    forced: Mapping[str, Owned] | None = None,
) -> Proposal:
    """How the parameters called `candidates` are cut over `ranks`; those in `keep` stay whole, and those in `forced`
    are cut as it says (along that dim, where it has no ids). Raises Refused where they cannot be."""
    return _Search(captured, ranks, keep, candidates, forced or {}).run()


def owned_under(shapes: Mapping[str, tuple[int, ...]], plan: Plan) -> dict[str, Owned]:
    """The parameters that the plan's splits cut: dim, and the rank of each of its indices."""
    found: dict[str, Owned] = {}
    for name, size in shapes.items():
        dim, ranks = tensor_spans(name, size, plan)
        if dim is not None:
            ids = [0] * size[dim]
            for rank, held in enumerate(ranks):
                for first, stop in held:
                    ids[first:stop] = [rank] * (stop - first)
            found[name] = Owned(dim, tuple(ids))
    return found


def _regions(atoms: Atoms, cuts: Mapping[str, Ids]) -> list[list[str]]:
    """Parameters that share atoms, together."""
    regions: list[tuple[set[int], list[str]]] = []
    for name, ids in cuts.items():
        mine = set(atoms.resolve(ids))
        touching = [one for one in regions if one[0] & mine]
        names = [each for one in touching for each in one[1]]
        regions = [one for one in regions if not any(one is other for other in touching)]
        regions.append((mine.union(*(one[0] for one in touching)), [*names, name]))
    return [names for _, names in regions]


def _origin(node: fx.Node, dim: int, through: Collection[str] = (*CARRY, "getitem")) -> tuple[fx.Node, int] | None:
    """The input, and its dim, that `node` is a part or a view of."""
    while node.op == "call_function":
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        if name not in through:
            return None
        n = len(node.args[0].meta["val"].shape) if name != "getitem" else 0  # type: ignore[union-attr]
        if n > 2 or (n == 1 and name in ("t", "numpy_T", "transpose")):
            return None
        if n == 2 and name in ("t", "numpy_T", "transpose"):
            dim = 1 - dim
        node = node.args[0]  # type: ignore[assignment]
    return (node, dim) if node.op == "placeholder" else None


def _word(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))
