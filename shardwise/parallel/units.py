"""`Units`: parts of a module whose parameters are whole only while they compute (zero=3).

At rest a rank has its rows of every parameter. A unit's forward gathers what it needs and gives it back; so does its
backward, whose gradients leave by rows (ZeRO stage 3, Rajbhandari et al. 2020, section 5.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from shardwise.comm.group import Group
from shardwise.models.dataflow import leaves_of
from shardwise.parallel.rows import Cut, Rows

SMALLEST = 1 / 64  # of the model: a part with less than that is gathered with the rest


class Unit:
    """The parameters that one module alone has, or those that no unit has (`module` None: whole for all of a step)."""

    def __init__(self, module: nn.Module | None, cuts: list[Cut], group: Group) -> None:
        self.cuts = cuts
        self._module = module
        self._group = group
        self._kinds = [[c for c in cuts if _kind(c) == kind] for kind in dict.fromkeys(map(_kind, cuts))]
        self._rows = [Rows([c.whole.shape for c in kind], group.size()) for kind in self._kinds]
        self._replaced: Any = None
        self._wrapped = False
        self.opened = False

    def rest(self) -> None:
        """From now on the module has this rank's rows, and the whole takes no memory while the unit is closed."""
        for kind, rows in zip(self._kinds, self._rows, strict=True):
            for index, cut in enumerate(kind):
                mine = rows.own(index, cut.own.data, self._group.rank())
                cut.own.data = mine.clone(memory_format=torch.contiguous_format)
        self.opened = True
        self.close()

    def open(self) -> None:
        """The parameters are whole. Collective over the shard axis."""
        if self.opened:
            return
        for kind, rows in zip(self._kinds, self._rows, strict=True):
            own = kind[0].own
            piece = own.new_zeros(rows.size)
            rows.pack_own([cut.own.detach() for cut in kind], piece)
            packed = own.new_empty(rows.size * self._group.size())
            self._group.all_gather_single(packed, piece).wait()
            for cut in kind:
                cut.whole.untyped_storage().resize_(cut.whole.numel() * cut.whole.element_size())
            rows.unpack(packed, [cut.whole.data for cut in kind])  # autograd counts no writes to `data`
        for cut in self.cuts:
            cut.whole.requires_grad_(cut.own.requires_grad)
            _place(cut, cut.whole)
        self.opened = True

    def close(self) -> None:
        """The whole parameters take no memory; what backward has kept of them is there again when they are."""
        if not self.opened:
            return
        self.opened = False
        for cut in self.cuts:
            _place(cut, cut.own)
            cut.whole.untyped_storage().resize_(0)

    def keep(self) -> None:
        """The module's own parameters are whole from now on. Collective."""
        self.open()
        for cut in self.cuts:
            cut.own.data = cut.whole.data
            _place(cut, cut.own)
        self.cuts, self._kinds, self._rows = [], [], []  # nothing is left to open or close

    def wrap(self) -> None:
        """The module's forward opens the unit from now on."""
        if self._module is not None:
            self._replaced = vars(self._module).get("forward")
            self._module.forward = partial(self._forward, self._module.forward)
            self._wrapped = True

    def unwrap(self) -> None:
        """The module's forward is its own again."""
        if self._module is not None and self._wrapped:
            del self._module.forward
            if self._replaced is not None:
                self._module.forward = self._replaced
            self._wrapped = False

    def _forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        was_open = self.opened  # by the step, or by a backward that computes activations again
        self.open()
        try:
            output = own(*args, **kwargs)
            if torch.is_grad_enabled():
                self._await_backward((args, kwargs), output)
            return output
        finally:
            if not was_open:
                self.close()

    def _await_backward(self, given: Any, output: Any) -> None:
        out = _following(output)
        if out:
            register_multi_grad_hook(out, lambda _: self.open(), mode="any")
        into = _following(given)
        if out and into and not any(cut.own.requires_grad for cut in self.cuts):
            register_multi_grad_hook(into, lambda _: self.close())  # no gradient of its own will say that it is done


class Units:
    """All units of a module: `each` in the order of the module, the rest of its parameters first."""

    def __init__(self, module: nn.Module, cuts: Sequence[Cut], group: Group) -> None:
        found = _parts(module, cuts)
        inside = {id(cut) for _, mine in found for cut in mine}
        self._root = Unit(None, [cut for cut in cuts if id(cut) not in inside], group)
        self.each = [self._root, *(Unit(part, mine, group) for part, mine in found)]
        for unit in self.each:
            unit.rest()
            unit.wrap()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around forward passes: what is in no unit is whole. Collective."""
        self._root.open()
        try:
            yield
        finally:
            self.close()

    def open(self) -> None:
        """What is in no unit is whole until `close`. Collective."""
        self._root.open()

    def open_all(self) -> None:
        """Every parameter is whole until `close`. Collective."""
        for unit in self.each:
            unit.open()

    def close(self) -> None:
        """Only the rows of this rank are there."""
        for unit in self.each:
            unit.close()

    def close_parts(self) -> None:
        """The same, but for what is in no unit."""
        for unit in self.each[1:]:
            unit.close()

    def dissolve(self) -> None:
        """The module is whole for good. Collective."""
        for unit in self.each:
            unit.keep()

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """In this block forwards are the module's own."""
        for unit in self.each:
            unit.unwrap()
        try:
            yield
        finally:
            for unit in self.each:
                unit.wrap()

    def unwrap(self) -> None:
        """The module's forwards are its own again; it keeps this rank's rows."""
        self.close()
        for unit in self.each:
            unit.unwrap()


def _parts(module: nn.Module, cuts: Sequence[Cut]) -> list[tuple[nn.Module, list[Cut]]]:
    """The members of the outermost lists of modules that are no small part of it, with the parameters that no other
    module has."""
    by_id = {id(cut.own): cut for cut in cuts}
    total = sum(cut.own.numel() for cut in cuts)
    found = []
    for part in _members(module):
        inside = {id(p) for p in part.parameters()} & set(by_id)
        held = {id(m) for m in part.modules()}
        mine = [by_id[i] for i in by_id if i in inside and all(id(m) in held for m, _ in by_id[i].places)]
        if len(mine) == len(inside) and sum(cut.own.numel() for cut in mine) >= SMALLEST * total > 0:
            found.append((part, mine))
    return found


def _members(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return list(dict.fromkeys(module.children()))
    return list(dict.fromkeys(member for child in module.children() for member in _members(child)))


def places_of(module: nn.Module, names: Collection[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each of the module's parameters sits; one that is tied sits in several places."""
    first = {id(p): name for name, p in module.named_parameters()}
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    for part in module.modules():
        for key, p in part._parameters.items():
            if p is not None and first[id(p)] in found:
                found[first[id(p)]].append((part, key))
    return found


def _place(cut: Cut, parameter: nn.Parameter) -> None:
    for module, key in cut.places:
        if type(module).__setattr__ is nn.Module.__setattr__:
            module._parameters[key] = parameter
        else:
            setattr(module, key, parameter)  # torch's LSTM keeps a list of its own


def _following(values: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(values) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _kind(cut: Cut) -> tuple[torch.dtype, torch.device]:
    return cut.whole.dtype, cut.whole.device
