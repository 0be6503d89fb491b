"""A module built by part: on each rank the values of one process, and memory only for what the rank holds.

The function that makes the module runs twice. The first run tells which parameters there are and in what order they
come to be; it draws nothing and every parameter is away: address space without memory. In the second run what the rank
does not hold is away as soon as a module takes it. What would be written there is left out, but for random numbers,
which are drawn and thrown away, so that the next parameter gets those that it has in one process.
"""

from __future__ import annotations

import copy
import gc
import mmap
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shardwise.errors import JobError

Holds = Callable[[str], bool]  # the name of a parameter -> whether this rank has it
_SHAPES_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
_RAW = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr)  # what looks past torch's operators
_away: set[int] = set()  # the storages that are away, in the build that runs now


def build_part(model: Callable[[], nn.Module], holds: Holds) -> nn.Module:
    """`model()`, of whose parameters those that `holds` does not name are zeros without memory, never to be read.

    At most what is held and one tensor more is in memory at a time, besides what the function keeps itself. A
    parameter that others are computed from is there until the end, and a function that does not do the same twice
    builds the module whole. Raises JobError for one that hands out what it has built before.
    """
    if active_fake_mode() is not None:
        return model()  # nothing there has memory
    first = _Build(lambda _: True, draws=False)
    with _same_chances():
        module = first.run(model)
    if not any(id(p) in first.numbers for p in module.parameters()):
        return module  # it was there before
    names = first.names(module)
    first.release()
    del module
    gc.collect()
    away = {number for number, name in names.items() if not holds(name)} - first.read
    with _same_chances(keep=False) as restart:
        second = _Build(away.__contains__, draws=True)
        module = second.run(model)
        same = second.names(module) == names and not second.read & away
        _refuse_built_before(module, first)
        if not same:
            restart()
            module = model()
            _refuse_built_before(module, second)
    return module


def has_memory(parameter: Tensor) -> bool:
    """Whether a parameter's values count in the build that runs now: not where it is away or a fake one."""
    if is_fake(parameter) or parameter.device.type == "meta":
        return False
    return _storage(parameter) not in _away


def copy_without_memory(module: nn.Module) -> nn.Module:
    """A deep copy with the same parameters in memory, for a run that changes none."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): buffer.clone() for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


class _Build:
    """One run of the function. Parameters are numbered as they come; those that `leaves` are away at once."""

    def __init__(self, leaves: Callable[[int], bool], *, draws: bool) -> None:
        self.numbers: dict[int, int] = {}  # by id
        self.read: set[int] = set()  # the numbers of those whose values something took
        self.gone: dict[int, tuple[int, Tensor]] = {}  # by storage, which is kept so that no other has its number
        self._parameters: list[nn.Parameter] = []
        self._leaves, self._draws = leaves, draws

    def run(self, model: Callable[[], nn.Module]) -> nn.Module:
        with ExitStack() as stack:
            stack.callback(_away.clear)
            stack.callback(register_module_parameter_registration_hook(self._registered).remove)
            stack.enter_context(self._copies())
            stack.enter_context(_Operators(self, self._draws))
            stack.enter_context(_Raw(self))
            module = model()
        if not isinstance(module, nn.Module):
            raise JobError(f"model() of the job returned {type(module).__name__}; it must return an nn.Module.")
        return module

    def names(self, module: nn.Module) -> dict[int, str]:
        """The names in the finished module, by number; what did not end up in it has none."""
        return {self.numbers[id(p)]: name for name, p in module.named_parameters() if id(p) in self.numbers}

    def has_built(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.numbers

    def release(self) -> None:
        """Keep the parameters, which the next run must not meet again, without what they hold."""
        for parameter in self._parameters:
            if parameter.device.type == "cpu":
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def number_of(self, tensor: Tensor) -> int | None:
        """The number of the parameter that is away and that this is, or is a view of."""
        found = self.gone.get(_storage(tensor)) if _has_storage(tensor) else None
        return found[0] if found is not None else None

    def _registered(self, _: nn.Module, __: str, parameter: Tensor | None) -> None:
        if isinstance(parameter, nn.Parameter):
            self.take(parameter)

    def take(self, parameter: nn.Parameter) -> None:
        """Number a parameter that was not seen before, and let it go if this rank does not hold it."""
        if id(parameter) in self.numbers:
            return
        number = self.numbers[id(parameter)] = len(self._parameters)
        self._parameters.append(parameter)
        if type(parameter.data) is not Tensor or not _has_storage(parameter) or parameter.device.type != "cpu":
            return
        other = self.number_of(parameter)
        if other is not None or parameter.untyped_storage().nbytes() != parameter.nbytes:
            self.read |= {number} if other is None else {number, other}  # it shares memory with something
        elif self._leaves(number) and parameter.nbytes >= mmap.PAGESIZE:
            parameter.data = _reserved(parameter)
            self.gone[_storage(parameter)] = number, parameter.data
            _away.add(_storage(parameter))

    @contextmanager
    def _copies(self) -> Iterator[None]:
        """A deep copy of a module registers nothing, so its parameters tell themselves."""
        kind: Any = nn.Parameter
        plain = kind.__deepcopy__

        def copied(parameter: nn.Parameter, memo: dict[int, Any]) -> Any:
            made = plain(parameter, memo)
            if type(made) is nn.Parameter:
                self.take(made)
            return made

        kind.__deepcopy__ = copied
        try:
            yield
        finally:
            kind.__deepcopy__ = plain


class _Operators(TorchDispatchMode):
    """Leaves out what is written into parameters that are away, draws their random numbers, and sees who reads them."""

    def __init__(self, build: _Build, draws: bool) -> None:
        super().__init__()
        self._build, self._draws = build, draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        numbers = {id(t): self._number(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        gone = {each for each, number in numbers.items() if number is not None}
        if not gone or _is_view(func) or func.overloadpacket.__name__ in (*_SHAPES_ONLY, *_NEW):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        skips = bool(written) and all(id(t) in gone for t in written) and len(func._schema.returns) == 1
        self._build.read |= {n for each, n in numbers.items() if n is not None and each not in map(id, written)}
        if not skips:
            self._build.read |= {n for n in numbers.values() if n is not None}
            return func(*args, **kwargs)
        if self._draws and torch.Tag.nondeterministic_seeded in func.tags:
            func(*tree_map(self._elsewhere, args), **tree_map(self._elsewhere, kwargs))
        return written[0]

    def _number(self, tensor: Tensor) -> int | None:
        return self._build.number_of(tensor)

    def _elsewhere(self, leaf: Any) -> Any:
        """The same place in memory order, so that as many numbers are drawn in the same way, and then forgotten."""
        if not isinstance(leaf, Tensor) or self._number(leaf) is None:
            return leaf
        return _reserved(leaf)


class _Raw(TorchFunctionMode):
    """Sees who reads past torch's operators."""

    def __init__(self, build: _Build) -> None:
        super().__init__()
        self._build = build

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RAW:
            number = self._build.number_of(args[0])
            self._build.read |= set() if number is None else {number}
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether it gives another view of its argument, or makes one of the argument itself."""
    given = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return torch.Tag.inplace_view in func.tags or any(not alias.is_write for alias in given)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _reserved(like: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype, whose pages exist once somebody writes into them."""
    elements = 1 + sum((extent - 1) * stride for extent, stride in zip(like.shape, like.stride(), strict=True))
    pages = mmap.mmap(-1, max(1, elements) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).as_strided(like.shape, like.stride())


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_fake(tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _refuse_built_before(module: nn.Module, build: _Build) -> None:
    for name, parameter in module.named_parameters():
        if build.has_built(parameter):
            raise JobError(
                f"model of the job hands out the same '{name}' in two calls. It is called once to see what there is "
                "and once to make what this rank holds: let it build a new module in each call."
            )


@contextmanager
def _same_chances(*, keep: bool = True) -> Iterator[Callable[[], None]]:
    """Gives what sets all random generators back; with `keep` that is done at the end."""
    state, plain, arrays = torch.get_rng_state(), random.getstate(), np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restart() -> None:
        torch.set_rng_state(state)
        random.setstate(plain)
        np.random.set_state(arrays)
        if devices:
            torch.cuda.set_rng_state_all(devices)

    try:
        yield restart
    finally:
        if keep:
            restart()
