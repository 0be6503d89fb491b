"""A module on one rank of the tensor axis: its parameters are this rank's parts, and its units run as programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.comm.mesh import Mesh
from shardwise.errors import SpecError
from shardwise.models.blocks import find_blocks, owner
from shardwise.parallel.sharded import refuse_unlike_by_rows
from shardwise.parallel.stage import stand_in
from shardwise.parallel.tensor.crossing import GroupCrossing
from shardwise.parallel.tensor.experts import Mixture, is_list
from shardwise.parallel.tensor.links import GroupLinks, gathered
from shardwise.parallel.tensor.mixed import called_children, in_expert, opened, planned
from shardwise.parallel.tensor.propose import Owned, owned_under
from shardwise.parallel.tensor.seen import configurations
from shardwise.parallel.tensor.sequence_unit import SequenceUnit
from shardwise.parallel.tensor.shares import SequenceLinks
from shardwise.parallel.tensor.unit import Unit
from shardwise.parallel.ties import kept
from shardwise.spec.layout import split_of
from shardwise.spec.plan import Plan


class Tensors:
    """The cut parameters of a module and its units. Made when every rank has the same whole values; collective."""

    def __init__(self, module: nn.Module, plan: Plan, mesh: Mesh) -> None:
        group = mesh.axis("tensor").group
        assert group is not None
        self.group, self.module = group, module
        self.links = SequenceLinks(group) if plan.sequence else GroupLinks(group)
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.owned = owned_under(self.shapes, plan)
        self._device = mesh.device
        self._checked: set[int] = set()  # optimizers
        if not self.owned:
            raise SpecError(
                f"the plan {plan} has splits that match no parameter of the model. Let sw.plan or sw.session make "
                "them, or name its parameters."
            )
        self._caches = [c for c in {id(c): c for c in configurations(module)}.values() if getattr(c, "use_cache", 0)]
        for config in self._caches:
            config.use_cache = False
        self._cut(set(kept(module, plan, mesh.rank)))
        mixtures = planned(module, self.owned, [name for name in self.owned if _how(name, plan) == "experts"])
        self.units: list[Unit | Mixture] = [
            *_units(module, self.owned, plan, self.links, {name: one.experts for name, one in mixtures.items()}),
            *(Mixture(module.get_submodule(name), *one, GroupCrossing(group)) for name, one in mixtures.items()),
        ]
        self.open()

    def open(self) -> None:
        for unit in self.units:
            unit.open()

    def close(self) -> None:
        """The units' own forwards are back; the parameters stay this rank's parts until `gather`."""
        for unit in self.units:
            unit.close()
        for config in self._caches:
            config.use_cache = True

    def gather(self) -> None:
        """Every rank takes the others' parts: the module is whole again, and an ordinary one. Collective."""
        for unit in self.units:
            unit.dissolve()
        for name, p in self.module.named_parameters():
            if name in self.owned:
                p.data = gathered(p.data, self.links, *self.owned[name])
                p.grad = None
        self.owned = {}

    def check(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Raise JobError for an optimizer that does not update a part of a parameter as it does the whole. Collective
        the first time."""
        for each in optimizers:
            if id(each) not in self._checked:
                refuse_unlike_by_rows(each, self.group, self._device)
                self._checked.add(id(each))

    def norm(self, reducer: Any, elsewhere: Collection[str] = ()) -> float:
        """The 2-norm of the reducer's gradients over all ranks of this axis, without those `elsewhere`: what is cut is
        summed, what is whole counts once. Collective."""
        cut = reducer.norm({name for name in self.shapes if name not in self.owned} | set(elsewhere))
        whole = reducer.norm({*self.owned, *elsewhere})
        row = torch.tensor([cut * cut, whole * whole / self.links.ranks], dtype=torch.float64, device=self._device)
        self.group.all_reduce(row).wait()
        total = float(row.sum())
        return math.sqrt(total) if total >= 0 else total  # nan stays nan

    def _cut(self, here: Collection[str]) -> None:
        """What other stages have takes no memory."""

        def nothing(like: Tensor, shape: torch.Size) -> Tensor:
            return stand_in(shape, like.dtype, like.device)

        for name, p in self.module.named_parameters():
            if name in self.owned:
                part = self.links.take(p.data if name in here else nothing(p, p.shape), *self.owned[name])
                p.data = part.clone(memory_format=torch.contiguous_format) if name in here else nothing(p, part.shape)
                p.grad = None


def _how(name: str, plan: Plan) -> str:
    split = split_of(name, plan)
    return split.how if split is not None else "whole"


def _units(
    module: nn.Module,
    cut: Mapping[str, Owned],
    plan: Plan,
    links: GroupLinks,
    mixtures: Mapping[str, Collection[str]],
) -> list[Unit]:
    """The modules that run as programs: blocks, what has several cut weights together, and tables of a vocabulary."""
    names = {id(p): name for name, p in module.named_parameters()}
    every = [(alias, names[id(p)]) for alias, p in module.named_parameters(remove_duplicate=False)]
    layers: dict[str, bool] = {}  # and whether it is a table
    for alias, name in every:
        if name in cut and (how := _how(name, plan)) != "experts":
            layers[alias.rpartition(".")[0]] = how == "vocabulary"
    units: list[Unit] = []
    blocks = list(find_blocks(module))
    called = dict(module.named_modules())  # each once, under its first name
    tables = [layer for layer, table in layers.items() if table and layer in called and not called[layer]._modules]
    others = [name for name, table in layers.items() if not table]
    for top in (*_tops(_regions(module, mixtures), others, called, mixtures), *tables):
        part = module.get_submodule(top)
        inside = {inner: names[id(p)] for inner, p in part.named_parameters()}
        mine = {inner: cut[name] for inner, name in inside.items() if name in cut}
        whole = {inner: _whole(p, mine.get(inner)) for inner, p in part.named_parameters()}
        if isinstance(links, SequenceLinks) and top not in tables:
            units.append(SequenceUnit(part, mine, whole, links, hands=top in blocks))
        else:
            units.append(Unit(part, mine, whole, links, scores=top in tables))
    return units


def _whole(p: Tensor, cut: Owned | None) -> tuple[int, ...]:
    return tuple(len(cut.ids) if cut is not None and d == cut.dim else n for d, n in enumerate(p.shape))


def _regions(module: nn.Module, mixtures: Mapping[str, Collection[str]]) -> list[str]:
    """The blocks; of those with a mixture of experts what is beside it."""

    def through(name: str) -> list[str]:
        inside = opened(module, name, mixtures)
        if inside is None and is_list(part := module.get_submodule(name)):
            inside = [f"{name}.{child}" for child, _ in called_children(part)]
        return [name] if inside is None else [one for inner in inside for one in through(inner)]

    return [one for name in find_blocks(module) if not in_expert(name, mixtures) for one in through(name)]


def _tops(
    blocks: Sequence[str],
    layers: Sequence[str],
    modules: Mapping[str, nn.Module],
    mixtures: Collection[str],
) -> list[str]:
    """Blocks that have cut layers; elsewhere the smallest modules that have several of them, not in one another."""
    found = [block for block in blocks if any(owner(layer, [block]) for layer in layers)]
    rest = [layer for layer in layers if owner(layer, blocks) is None]
    together = {_shared(a, b) for a in rest for b in rest if a != b} - {""}
    together = {name for name in together if not isinstance(modules.get(name), (nn.ModuleList, nn.ModuleDict))}
    together = {name for name in together if not any(f"{one}.".startswith(f"{name}.") for one in mixtures)}
    tops = {max((t for t in together if layer.startswith(t + ".")), key=len, default=layer) for layer in rest}
    return found + sorted(top for top in tops if not any(top.startswith(other + ".") for other in tops))


def _shared(a: str, b: str) -> str:
    """The name of the smallest module that has both."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return ".".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
