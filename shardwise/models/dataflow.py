"""What each part of a module takes from the parts before it, seen in one run: the values that a cut must carry.

No tracing: the module's own `forward` runs once, and every tensor remembers which calls' outputs, and which parameters
and buffers outside of them, it was computed from.

    call 0: embedding -> call 1: block 0 -> call 2: block 1 -> ...      call 2 needs (1, 0): the first leaf of call 1
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from shardwise.errors import JobError
from shardwise.models.blocks import find_blocks, num_parameters
from shardwise.models.inputs import call

LARGE = 0.25  # of all parameters
PARALLEL = str(Path(__file__).parents[1] / "parallel")
OURS = (str(Path(torch.__file__).parent), __file__, PARALLEL, "<")  # files that are not the model's

Value = tuple[int, int]  # (call, leaf): a tensor that a block returned
Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], tuple[Any, Any]]


class Passed(NamedTuple):
    """A leaf that was returned as it was given: the number of it among the leaves of the call's arguments."""

    argument: int


class Made(NamedTuple):
    """A tensor that the call computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class Plain(NamedTuple):
    """A leaf that is no tensor."""

    value: Any


Leaf = Passed | Made | Plain


class Needs(NamedTuple):
    """Where a value comes from, through code outside of the calls: what they returned, parameters and buffers, and
    after how many calls, and in which line, that code drew random numbers."""

    values: frozenset[Value] = frozenset()
    tensors: frozenset[str] = frozenset()
    drawn: frozenset[tuple[int, str]] = frozenset()

    def __or__(self, other: Any) -> Needs:
        return Needs(self.values | other.values, self.tensors | other.tensors, self.drawn | other.drawn)


class Call(NamedTuple):
    """One call of the module called `name`: what its inputs need, and what it returned."""

    name: str
    needs: Needs
    leaves: tuple[Leaf, ...]
    tree: TreeSpec


class Dataflow(NamedTuple):
    """The calls in their order, what the loss needs through the code after them, whether anything drew random numbers,
    and which values are written into after they were returned."""

    calls: tuple[Call, ...]
    loss: Needs
    random: bool
    written: frozenset[Value] = frozenset()


def dataflow(module: nn.Module, batch: Any, *, forward: Forward | None = None, loss: Loss | None = None) -> Dataflow:
    """Run `module` on `batch` twice, in whatever mode it is; its buffers and torch's generators move on, so hand in a
    copy, or one of fake tensors, which compute nothing. Without `loss` its output is what is wanted.

    Raises JobError where numbers that a call computed decide which way the code goes, and where one leaves a tensor
    to others beside what it returns.
    """
    names = units(module, _counted(module, batch, forward))
    watch = _Watch(module)
    with ExitStack() as stack:
        for name in names:
            one = module.get_submodule(name)
            stack.callback(one.register_forward_pre_hook(partial(watch.enter, name), with_kwargs=True).remove)
            stack.callback(one.register_forward_hook(partial(watch.leave, name), with_kwargs=True).remove)
        stack.enter_context(watch)
        output = call(module, batch, forward)
        wanted = loss(output, batch) if loss is not None else output
        needs = watch.needs(wanted)
    return Dataflow(tuple(watch.calls), needs, watch.random, frozenset(watch.written))


def units(module: nn.Module, counts: Mapping[str, int]) -> list[str]:
    """The modules between whose calls one may cut: the repeated blocks, and what has parameters beside them.

    Where nothing is repeated, a module that holds much is taken apart, unless it is called (`counts`) several times.
    """
    blocks = find_blocks(module)
    total = num_parameters([module])
    found: list[str] = []

    def walk(name: str, part: nn.Module) -> None:
        if name in blocks or _is_unit(name, part):
            found.append(name)
            return
        for child, inner in part.named_children():
            walk(f"{name}.{child}" if name else child, inner)

    def _is_unit(name: str, part: nn.Module) -> bool:
        if not name or not counts.get(name) or any(block.startswith(name + ".") for block in blocks):
            return False
        own = num_parameters([part])
        apart = not blocks and counts[name] == 1 and own > LARGE * total and any(True for _ in part.children())
        return (own > 0 or (isinstance(part, _NormBase) and part.track_running_stats)) and not apart

    walk("", module)
    return found


def _counted(module: nn.Module, batch: Any, forward: Forward | None) -> Counter[str]:
    """How often each module is called."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, part in module.named_modules():
            hook = part.register_forward_pre_hook(lambda _, __, name=name: counts.update([name]))
            stack.callback(hook.remove)
        with torch.no_grad():
            call(module, batch, forward)
    return counts


class _Watch(TorchDispatchMode):
    """Follows values by their storage; what is followed is kept, so that no storage's number is used twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.random = False
        self.written: set[Value] = set()
        self._returned: dict[int, set[Value]] = {}  # storage -> the values that lie in it
        self._known: dict[int, Needs] = {}
        self._kept: list[Tensor] = []
        self._inside: dict[int, str] = {}  # storages that a call made, or that follow from them, until it returns them
        self._open: str | None = None
        self._made: set[int] = set()  # storages that the open call made
        self._versions: dict[int, int] = {}
        self._arguments: list[Any] = []
        self._needs = Needs()
        self._buffers = {_storage(buffer): name for name, buffer in module.named_buffers()}
        self._spoilt: dict[int, str] = {}  # storages that an earlier call wrote into and did not return
        self._written: set[int] = set()  # older storages that the open call has written into
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._note(tensor, Needs(tensors=frozenset([name])))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        needs = self._of(given)
        if self._open is not None:
            self._read(given)
        elif func is torch.ops.aten._local_scalar_dense.default and (needs.values or needs.tensors):
            raise JobError(
                f"the model's forward{_line()} looks at numbers that its parts computed or that are trained: a value "
                "of a tensor decides what runs, or becomes a number of Python, so no stage can run without the others. "
                "Keep them as tensors."
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
            if self._open is None:
                needs |= Needs(drawn=frozenset([(len(self.calls), _line())]))
        self._refuse_spoilt(given)
        if func._schema.is_mutable:
            self._look_at_written(func, args, kwargs)
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        old = [_storage(tensor) for tensor in given]
        secret = self._open or next((self._inside[each] for each in old if each in self._inside), None)
        for tensor in (*made, *(given if func._schema.is_mutable else ())):
            self._note(tensor, needs)
            if secret is not None and _storage(tensor) not in old:
                self._inside[_storage(tensor)] = secret
                self._made.add(_storage(tensor))
        return out

    def _look_at_written(self, func: Any, args: Any, kwargs: Any) -> None:
        """A buffer changes where its own part is called, or it would be another one on each stage."""
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, Tensor):
                continue
            storage = _storage(value)
            name = self._buffers.get(storage)
            self.written |= self._returned.get(storage, set())
            if name is None and self._open is not None and storage not in self._made:
                self._written.add(storage)
            if name is not None and (self._open is None or not name.startswith(f"{self._open}.")):
                raise JobError(
                    f"the model changes its buffer '{name}'{_line()}, outside of the part that it belongs to, so "
                    "stages would not agree on it. Change it in the forward of the module that has it, inside of a "
                    "block."
                )

    def _refuse_spoilt(self, given: list[Tensor]) -> None:
        """What a call writes into its argument stays on its stage, unless it returns it."""
        for tensor in given:
            if (block := self._spoilt.get(_storage(tensor))) is not None:
                raise JobError(
                    f"'{block}' writes into a tensor that it was given and does not return, and the model goes on with "
                    f"it{_line()}. Return it, or write into a copy."
                )

    def _read(self, given: list[Tensor]) -> None:
        """What a call reads counts as what it needs, however it came by it."""
        older = [tensor for tensor in given if _storage(tensor) not in self._made]
        self._needs |= self.needs(older)

    def needs(self, value: Any) -> Needs:
        """What the tensors in `value` were computed from. Raises JobError for what a block did not return."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if (block := self._inside.get(_storage(tensor))) is not None:
                raise JobError(
                    f"'{block}' leaves a tensor to others beside what it returns, which the model takes{_line()}; "
                    "return it instead."
                )
        return self._of(tensors)

    def enter(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._open is None:
            self._open = name
            self._made, self._written = set(), set()
            self._arguments = leaves_of((args, kwargs))
            self._needs = self.needs(self._arguments)
            tensors = [leaf for leaf in self._arguments if isinstance(leaf, Tensor)]
            self._versions = {id(tensor): tensor._version for tensor in tensors}

    def leave(self, name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._open != name:
            return
        self._open = None
        for storage in self._made:
            self._known[storage] = Needs()  # from now on what the call returned, leaf by leaf
        leaves, tree = tree_flatten(output, is_leaf=_whole)
        found = [self._leaf(leaf, number) for number, leaf in enumerate(leaves)]
        returned = {_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        self._spoilt.update((storage, name) for storage in self._written - returned)
        self.calls.append(Call(name, self._needs, tuple(found), tree))

    def _leaf(self, leaf: Any, number: int) -> Leaf:
        if not isinstance(leaf, Tensor):
            return Plain(leaf)
        same = [index for index, given in enumerate(self._arguments) if given is leaf]
        if same and self._versions[id(leaf)] == leaf._version:
            return Passed(same[0])
        self._inside.pop(_storage(leaf), None)
        value = len(self.calls), number
        self._returned.setdefault(_storage(leaf), set()).add(value)
        self._note(leaf, Needs(values=frozenset([value])))
        return Made(tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad)

    def _note(self, tensor: Tensor, needs: Needs) -> None:
        storage = _storage(tensor)
        if storage not in self._known:
            self._kept.append(tensor)
        self._known[storage] = self._known.get(storage, Needs()) | needs

    def _of(self, tensors: list[Tensor]) -> Needs:
        needs = Needs()
        for tensor in tensors:
            needs |= self._known.get(_storage(tensor), Needs())
        return needs


def leaves_of(value: Any) -> list[Any]:
    """The leaves of tuples, lists and mappings; an object of another kind, such as a cache, is a leaf."""
    return tree_leaves(value, is_leaf=_whole)


def _whole(value: Any) -> bool:
    return not isinstance(value, (tuple, list, dict))


def _line() -> str:
    """The line of the model's own code that runs now."""
    for frame, line in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        if not any(part in path for part in OURS):
            return f" in {path}, line {line}"
    return ""


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
