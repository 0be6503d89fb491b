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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from shardwise.comm.group import Group
from shardwise.errors import JobError
from shardwise.models.dataflow import leaves_of
from shardwise.parallel.rows import Cut, Rows

SMALLEST = 1 / 64  # of the model: a part with less than that is gathered with the rest
MARKS = 256  # numbers of units travel with their parameters, exact in every float format
LOOKS = (
    "__get__",
    "__set__",
    "size",
    "dim",
    "numel",
    "is_floating_point",
    "is_complex",
    "requires_grad_",
    "element_size",
)


class Unit:
    """The parameters that one module alone has, or those that no unit has (`module` None: whole for all of a step)."""

    def __init__(self, number: int, module: nn.Module | None, cuts: list[Cut], group: Group) -> None:
        self.cuts = cuts
        self.unlike: Tensor | None = None  # how many ranks gathered another unit at the same time
        self.sending = 0  # messages of gradients that its backward has not filled yet
        self._number = number % MARKS
        self._awaited = 0  # calls whose inputs have no gradient yet
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
            own = kind[0].own.data
            piece = own.new_zeros(rows.size + 1)
            piece[-1] = self._number
            rows.pack_own([cut.own.data for cut in kind], piece)
            packed = own.new_empty(self._group.size(), rows.size + 1)
            self._group.all_gather_single(packed.view(-1), piece).wait()
            others = (packed[:, -1] != self._number).sum()
            self.unlike = others if self.unlike is None else self.unlike + others
            for cut in kind:
                cut.whole.untyped_storage().resize_(cut.whole.numel() * cut.whole.element_size())
            rows.unpack(packed, [cut.whole.data for cut in kind])  # autograd counts no writes to `data`
        for cut in self.cuts:
            cut.whole.requires_grad_(cut.own.requires_grad)
            _place(cut, cut.whole)
        self.opened = True

    def sent(self) -> None:
        """One of the messages with its gradients has left."""
        self.sending -= 1
        self._leave()

    def reset(self, sending: int) -> None:
        """Closed, and ready for a forward and a backward that fill as many messages."""
        self.close()
        self.sending, self._awaited = sending, 0

    def _leave(self) -> None:
        """Every computation of a unit leads to a parameter that is trained or to an input: with all of their gradients
        there, nothing needs it any more."""
        if not self.sending and not self._awaited:
            self.close()

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
        stays = self.opened  # by the step, or by a backward that computes activations again
        self.open()
        try:
            output = self._loose(own(*args, **kwargs))
            if torch.is_grad_enabled():
                stays = not self._await_backward((args, kwargs), output) or stays
            return output
        finally:
            if not stays:
                self.close()

    def _loose(self, output: Any) -> Any:
        """The output, without memory of the unit's own: a block may return its parameters."""
        held = {cut.whole.untyped_storage().data_ptr() for cut in self.cuts}
        tensors = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
        if not any(leaf.untyped_storage().data_ptr() in held for leaf in tensors if leaf.layout == torch.strided):
            return output
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    def _await_backward(self, given: Any, output: Any) -> bool:
        """Open again when backward comes. False where nobody would know: the unit then stays open."""
        out, into = _following(output), _following(given)
        if any(_opaque(leaf) for leaf in leaves_of(output)) or not out:
            return not out and not into and not any(cut.own.requires_grad for cut in self.cuts)
        register_multi_grad_hook(out, lambda _: self.open(), mode="any")
        if into:
            self._awaited += 1
            register_multi_grad_hook(into, lambda _: self._arrived())
        return True

    def _arrived(self) -> None:
        self._awaited -= 1
        self._leave()


class Units:
    """All units of a module: `each` in the order of the module, the rest of its parameters first."""

    def __init__(self, module: nn.Module, cuts: Sequence[Cut], group: Group) -> None:
        found = _parts(module, cuts)
        inside = {id(cut) for _, mine in found for cut in mine}
        self._root = Unit(0, None, [cut for cut in cuts if id(cut) not in inside], group)
        self.each = [self._root, *(Unit(i, part, mine, group) for i, (part, mine) in enumerate(found, start=1))]
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
        self.refuse_unlike()

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

    def refuse_unlike(self) -> None:
        """Raise JobError where ranks have gathered unlike units together: what they computed is not the model's."""
        counts = [unit.unlike for unit in self.each if unit.unlike is not None]
        for unit in self.each:
            unit.unlike = None
        if counts and int(torch.stack(counts).sum()):
            raise JobError(
                "the ranks of the shard axis called parts of the model in unlike orders, so that they gathered each "
                "other's parameters. Let forward call its blocks in one order on all ranks, or use zero=2."
            )

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Around a first forward pass: raises JobError where the model reads a parameter outside of its unit."""
        return _Watch({id(cut.own): cut.name for unit in self.each for cut in unit.cuts})

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
    """A list has no forward of its own, so one in a list is looked into."""
    found: list[nn.Module] = []
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) and not is_list:
            found.append(child)
        else:
            found += _members(child)
    return list(dict.fromkeys(found))


class _Watch(TorchFunctionMode):
    """Looks for functions that are given a rank's rows in the place of a parameter."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in LOOKS:
            for leaf in tree_leaves((args, kwargs or {})):
                if id(leaf) in self._names and isinstance(leaf, nn.Parameter):
                    raise JobError(
                        f"the model reads '{self._names[id(leaf)]}' outside of the part that has it, where zero=3 "
                        "leaves only some of its rows. Read it in that part's forward, or use zero=2."
                    )
        return func(*args, **(kwargs or {}))


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


def _opaque(leaf: Any) -> bool:
    """Whether tensors may hide in it."""
    return not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__") and bool(vars(leaf))


def _following(values: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(values) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _kind(cut: Cut) -> tuple[torch.dtype, torch.device]:
    return cut.whole.dtype, cut.whole.device
