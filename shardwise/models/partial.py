"""A module built by part: on each rank the values of one process, and memory only for what the rank holds.

The function that makes the module runs twice. The first run tells which parameters there are and in what order they
come to be; it draws nothing and every parameter is away: address space without memory. In the second run what the rank
does not hold is away as soon as a module takes it. What would be written there is left out, but for random numbers,
which are drawn and thrown away, so that the next parameter gets those that it has in one process. Of a parameter that
the rank holds some rows of, the whole is computed elsewhere and the rows are kept.
"""

from __future__ import annotations

import copy
import gc
import mmap
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwise.errors import JobError
from shardwise.spec.layout import Box, Shape, whole

Holds = Callable[[str, Shape], Sequence[Box]]  # a parameter's name and shape -> what this rank has of it
_SHAPES_ONLY = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
_RAW = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr)  # what looks past torch's operators
_partial: dict[int, Sequence[Box]] = {}  # by storage, in the build that runs now
# In-place operators each of whose results follows from the same element alone, or from none.
_ELEMENTWISE = frozenset(
    """add_ bernoulli_ cauchy_ clamp_ clamp_max_ clamp_min_ copy_ div_ erfinv_ exp_ exponential_ eye fill_ geometric_
    log_normal_ masked_fill_ mul_ neg_ normal_ random_ sqrt_ sub_ uniform_ zero_""".split()  # noqa: SIM905
)


class Built(NamedTuple):
    """A module, and whether it is by part: then what a rank does not hold of a parameter is zeros without memory."""

    module: nn.Module
    by_part: bool


def build_part(model: Callable[[], nn.Module], holds: Holds) -> Built:
    """`model()`, whose parameters have values where `holds` says; what else they have is never to be read.

    At most what is held and one tensor more is in memory at a time, besides what the function keeps itself. A
    parameter that others are computed from is there until the end, and a function that does not do the same twice
    builds the module whole. Raises JobError for one that hands out what it has built before.
    """
    if active_fake_mode() is not None:
        return Built(model(), by_part=False)  # nothing there has memory
    first = _Build(lambda _: (), draws=False)
    with _same_chances():
        module = first.run(model)
    if not any(id(p) in first.numbers for p in module.parameters()):
        return Built(module, by_part=False)  # it was there before
    names = first.names(module)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    held = {number: holds(name, shapes[name]) for number, name in names.items() if number not in first.read}
    parts = {number: boxes for number, boxes in held.items() if list(boxes) != [whole(shapes[names[number]])]}
    first.release()
    del module
    gc.collect()
    with _same_chances(keep=False) as restart:
        second = _Build(parts.get, draws=True, drawn_in_views=first.drawn_in_views)
        try:
            module = second.run(model)
            same = second.names(module) == names and not second.read & parts.keys()
            _refuse_built_before(module, first)
        except RuntimeError:  # a view that columns, which lie in another order, do not allow
            same = False
        if not same:
            restart()
            module = model()
            _refuse_built_before(module, second)
        second.forget()
    return Built(module, by_part=same)


def parts_in_memory(parameter: Tensor) -> Sequence[Box]:
    """Where a parameter's values count in the build that runs now: nowhere in one that is away, or a fake one."""
    if is_fake(parameter) or parameter.device.type == "meta":
        return ()
    return _partial.get(_storage(parameter), (whole(tuple(parameter.shape)),))


def reserved(like: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """A tensor of zeros of the same shape, dtype and strides (or those given), whose pages exist once somebody writes
    into them."""
    strides = like.stride() if strides is None else strides
    elements = 1 + sum((extent - 1) * stride for extent, stride in zip(like.shape, strides, strict=True))
    pages = mmap.mmap(-1, max(1, elements) * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).as_strided(like.shape, strides)


def copy_without_memory(module: nn.Module) -> nn.Module:
    """A deep copy with the same parameters in memory, for a run that changes none."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): buffer.clone() for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


class _Away(NamedTuple):
    """A parameter that is not whole in memory: its number, its data, where the data count, and the strides that it was
    made with: what has columns alone lies column by column, so that the others have pages of their own."""

    number: int
    data: Tensor
    parts: Sequence[Box]
    strides: Sequence[int]


class _Build:
    """One run of the function. Parameters are numbered as they come; `parts` says where those count that are not whole
    (None for the others)."""

    def __init__(
        self,
        parts: Callable[[int], Sequence[Box] | None],
        *,
        draws: bool,
        drawn_in_views: Collection[int] = (),
    ) -> None:
        self.numbers: dict[int, int] = {}  # by id
        self.read: set[int] = set()  # the numbers of those whose values something took
        self.drawn_in_views = set(drawn_in_views)  # those of which a part got random numbers, in its order of memory
        self.draws = draws
        self._away: dict[int, _Away] = {}  # by storage, which is kept so that no other has its number
        self._parameters: list[nn.Parameter] = []
        self._parts = parts

    def run(self, model: Callable[[], nn.Module]) -> nn.Module:
        with ExitStack() as stack:
            stack.callback(_partial.clear)
            stack.callback(register_module_parameter_registration_hook(self._registered).remove)
            stack.enter_context(self._copies())
            stack.enter_context(_Operators(self))
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

    def forget(self) -> None:
        """Hold no tensor any more, whoever still holds this."""
        self._away.clear()
        self._parameters.clear()

    def away(self, tensor: Tensor) -> _Away | None:
        """What is known of the parameter that this is, or is a view of, if it is not whole in memory."""
        return self._away.get(_storage(tensor)) if _has_storage(tensor) else None

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
        other, parts = self.away(parameter), self._parts(number)
        if other is not None or parameter.untyped_storage().nbytes() != parameter.nbytes:
            self.read |= {number} if other is None else {number, other.number}  # it shares memory with something
        elif parts is not None and parameter.nbytes >= mmap.PAGESIZE:
            made = parameter.data
            columns = number not in self.drawn_in_views and _are_columns(parts, tuple(parameter.shape))
            parameter.data = reserved(parameter, (1, made.shape[0]) if columns else None)
            _copy_parts(made, parameter.data, parts)
            self._away[_storage(parameter)] = _Away(number, parameter.data, parts, made.stride())
            _partial[_storage(parameter)] = parts

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

    def __init__(self, build: _Build) -> None:
        super().__init__()
        self._build = build

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = [(tensor, away) for tensor in given if (away := self._build.away(tensor)) is not None]
        name, random = func.overloadpacket.__name__, torch.Tag.nondeterministic_seeded in func.tags
        if not found or _is_view(func) or name in (*_SHAPES_ONLY, *_NEW):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        alone = len(written) == len(func._schema.returns) == 1 and (random or name in _ELEMENTWISE)
        target = written[0] if alone else None
        self._build.read |= {away.number for tensor, away in found if tensor is not target}
        away = self._build.away(target) if target is not None else None
        if random and target is not None and away is not None and not _alike(target, away.data):
            self._build.drawn_in_views.add(away.number)
        if target is None or away is None or (away.parts and not _alike(target, away.data)):
            return func(*args, **kwargs)
        if away.parts or (random and self._build.draws):
            # the same place in memory order, so that as many numbers are drawn in the same way
            made = reserved(target, away.strides if away.parts else None)
            _copy_parts(target, made, away.parts)
            func(
                *(made if arg is target else arg for arg in args),
                **{k: made if v is target else v for k, v in kwargs.items()},
            )
            _copy_parts(made, target, away.parts)
        return target


class _Raw(TorchFunctionMode):
    """Sees who reads past torch's operators."""

    def __init__(self, build: _Build) -> None:
        super().__init__()
        self._build = build

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RAW:
            away = self._build.away(args[0])
            self._build.read |= set() if away is None else {away.number}
        return func(*args, **(kwargs or {}))


def _copy_parts(source: Tensor, target: Tensor, parts: Sequence[Box]) -> None:
    for box in parts:
        target.detach()[box.slices].copy_(source.detach()[box.slices])


def _are_columns(parts: Sequence[Box], shape: Shape) -> bool:
    return (
        len(shape) == 2
        and bool(parts)
        and all(box.shape[0] == shape[0] > 1 and box.shape[1] < shape[1] for box in parts)
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())


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
