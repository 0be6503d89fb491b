"""Any `nn.Module` -> `ModelProfile`: parameters, FLOPs and bytes of each block, measured without computing anything.

The module is built and run on fake tensors, which have shapes and storages but no numbers, so a model larger than
memory is profiled in seconds. (The meta device would take attention apart into products that no device keeps.)

    before -> block 0 -> block 1 -> ... -> after      what runs between two blocks belongs to the first of them
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.errors import JobError, ShardwiseError
from shardwise.models.blocks import find_blocks, linears, owner, tied_groups
from shardwise.models.flops import ProductBytes, flop_counter
from shardwise.models.inputs import call
from shardwise.spec.profile import BlockProfile, ModelProfile

BEFORE, AFTER, WHOLE = "before", "after", "model"
# More than one sample, which batch normalisation refuses, and a number that is hardly another tensor's first dimension.
FAKE_SAMPLES, REAL_SAMPLES = 7, 3

T = TypeVar("T")
Build = nn.Module | Callable[[], nn.Module]
Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], tuple[Any, Any]]


def profile(build: Build, example: Any, *, forward: Forward | None = None, loss: Loss | None = None) -> ModelProfile:
    """What the module costs for one sample of `example`, a batch as the data gives it (batch first).

    `build` is the module, which is left as it is, or a function that makes it. FLOPs count a multiplication and an
    addition as two, for matrix products, convolutions, recurrent layers and attention (all of it, also where a causal
    mask hides half). Activation bytes are the distinct storages that autograd keeps in a training forward pass,
    without parameters and buffers; `loss`, if given, is measured as part of the last block. A module that cannot run
    on fake tensors, because it looks at numbers, is run on three real samples. Raises JobError with the
    module's own error when that fails too. The first call in a process takes a second longer: torch imports its
    compiler.
    """

    def measure(module: nn.Module, batch: Any, samples: int) -> ModelProfile:
        return Measurement(forward, loss).run(module, batch, samples, describe(example), find_blocks(module))

    return on_samples(measure, build, example)


def on_samples(measure: Callable[[nn.Module, Any, int], T], build: Build, example: Any) -> T:
    """`measure(module, batch, samples)` on fake tensors and a module of fake parameters, in training mode; on a few
    real samples where that fails. Raises JobError with the module's own error when both fail."""
    samples = batch_size(example)
    errors: dict[str, Exception] = {}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for name, run in RUNS.items():
            try:
                with quiet():
                    return run(measure, build, example, samples)
            except ShardwiseError:
                raise
            except Exception as error:
                errors[name] = error
    raise _cannot_run(errors, example) from errors["real"]


def batch_size(example: Any) -> int:
    """The first dimension of the first tensor in a batch. Raises JobError when there is no such tensor."""
    for tensor in tensors_in(example):
        if tensor.ndim and tensor.shape[0]:
            return tensor.shape[0]
    raise JobError(
        f"the example batch ({type(example).__name__}) holds no tensor with at least one sample. "
        "Let the data give tensors whose first dimension is the sample."
    )


def describe(example: Any) -> str:
    """One sample's shapes, such as `tokens int64[256], targets int64[256]`."""
    entries = example.items() if isinstance(example, Mapping) else enumerate(_as_tuple(example))
    words = [
        f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape[1:])}"
        for name, value in entries
        if isinstance(value, Tensor)
    ]
    return ", ".join(words)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)


class Measurement:
    """One forward pass, watched. `place` is the block that runs now; a pair (block, True) the gap after it."""

    def __init__(self, forward: Forward | None, loss: Loss | None) -> None:
        self.forward, self.loss = forward, loss
        self.place: tuple[str, bool] = (BEFORE, False)
        self.flops: dict[tuple[str, bool], int] = defaultdict(int)
        self.saved: dict[tuple[str, bool], int] = defaultdict(int)
        self.products: dict[tuple[str, bool], int] = defaultdict(int)
        self.left: dict[str, int] = {}
        self.first_seen: dict[str, tuple[str, bool]] = {}
        self.kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its storage's number from being reused
        self.counter, self.counted_flops = flop_counter(), 0
        self.ran: dict[str, None] = {}  # the blocks in the order in which they first ran

    def run(
        self, module: nn.Module, batch: Any, samples: int, sample: str, blocks: dict[str, nn.Module]
    ) -> ModelProfile:
        """Forward `batch` through `module` with every hook in place; a chain of these blocks and what is around."""
        fixed = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
        with ExitStack() as stack:
            for handle in self._watch(module, blocks, samples):
                stack.callback(handle.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keeper(fixed), lambda tensor: tensor))
            stack.enter_context(self.counter)
            stack.enter_context(ProductBytes(self._count_product))
            output = call(module, batch, self.forward)
            if self.loss is not None:
                self.loss(output, batch)
            self._move(self.place)
        self.left[AFTER] = sum(tensor.nbytes for tensor in tensors_in(output))
        return self._result(module, blocks, samples, sample)

    def _move(self, place: tuple[str, bool]) -> None:
        total = self.counter.get_total_flops()
        self.flops[self.place] += total - self.counted_flops
        self.counted_flops, self.place = total, place

    def _count_product(self, size: int) -> None:
        self.products[self.place] += size

    def _keeper(self, fixed: set[int]) -> Callable[[Tensor], Tensor]:
        def keep(tensor: Tensor) -> Tensor:
            storage = _storage(tensor)
            if storage not in fixed and storage not in self.kept:
                self.kept[storage] = tensor
                self.saved[self.place] += tensor.untyped_storage().nbytes()
            return tensor

        return keep

    def _watch(self, module: nn.Module, blocks: dict[str, nn.Module], samples: int) -> Iterator[Any]:
        """Hooks that follow the run: into and out of each block, and where every module outside of them ran."""
        for name, block in blocks.items():
            yield block.register_forward_pre_hook(partial(self._enter, name, samples), with_kwargs=True)
            yield block.register_forward_hook(partial(self._leave, name))
        for name, inner in module.named_modules():
            if owner(name, blocks) is None:
                yield inner.register_forward_pre_hook(partial(self._see, name))

    def _enter(self, name: str, samples: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.ran:
            # Tables of positions and the like come along too, but only what grows with the batch must travel.
            inputs = [t for t in tensors_in((args, kwargs)) if t.ndim and t.shape[0] == samples]
            self.left[BEFORE] = sum(tensor.nbytes for tensor in inputs)
        self._move((name, False))
        self.ran[name] = None

    def _leave(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self.left[name] = sum(tensor.nbytes for tensor in tensors_in(output))
        self._move((name, True))

    def _see(self, name: str, _: nn.Module, __: Any) -> None:
        self.first_seen.setdefault(name, self.place)

    def _result(self, module: nn.Module, blocks: dict[str, nn.Module], samples: int, sample: str) -> ModelProfile:
        ran = list(self.ran)
        order = [BEFORE, *ran, *(name for name in blocks if name not in ran), AFTER]
        last_gap = self.place  # where the run ended

        def segment(place: tuple[str, bool]) -> str:
            return AFTER if place == last_gap else place[0]

        def gathered(counts: Mapping[tuple[str, bool], int]) -> dict[str, int]:
            sums = dict.fromkeys(order, 0)
            for place, count in counts.items():
                sums[segment(place)] += count
            return sums

        flops, saved, products = gathered(self.flops), gathered(self.saved), gathered(self.products)
        parameters, parameter_bytes = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
        for name, parameter in module.named_parameters():
            holder = owner(name, blocks) or segment(self._place_of(name))
            parameters[holder] += parameter.numel()
            parameter_bytes[holder] += parameter.nbytes
        inside = self._linears(module, blocks, segment)
        found = tuple(
            BlockProfile(
                name=name if blocks else WHOLE,
                parameters=parameters[name],
                parameter_bytes=parameter_bytes[name],
                forward_flops=flops[name] / samples,
                activation_bytes=round(saved[name] / samples),
                boundary_bytes=round(self.left.get(name, 0) / samples),
                product_bytes=round(products[name] / samples),
                linears=tuple(inside[name]),
            )
            for name in order
            if name in blocks or parameters[name] or flops[name] or saved[name]
        )
        norms = any(isinstance(each, _BatchNorm) for each in module.modules())
        return ModelProfile(blocks=found, sample=sample, tied=tied_groups(module), batch_norms=norms)

    def _place_of(self, name: str) -> tuple[str, bool]:
        """Where the module that holds parameter `name`, or else the nearest one around it that was called, ran."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.first_seen:
                return self.first_seen[name]
        return (BEFORE, False)

    def _linears(
        self, module: nn.Module, blocks: dict[str, nn.Module], segment: Callable[[tuple[str, bool]], str]
    ) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = defaultdict(list)
        for linear in linears(module):
            found[owner(linear.name, blocks) or segment(self._place_of(linear.name + ".weight"))].append(linear)
        return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_fake(measure: Callable[[nn.Module, Any, int], T], build: Build, example: Any, samples: int) -> T:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = _map_tensors(example, lambda tensor: mode.from_tensor(_resized(tensor, samples, FAKE_SAMPLES)))
    with mode:
        module = build if isinstance(build, nn.Module) else _built(build)
        if module is build or any(_storage(p) != _storage(p.detach()) for p in module.parameters()):
            module = _empty_copy(module)  # what copies of fake tensors share memory with, nothing says
        return measure(module.train(), batch, FAKE_SAMPLES)


def _on_real(measure: Callable[[nn.Module, Any, int], T], build: Build, example: Any, samples: int) -> T:
    batch = _map_tensors(example, lambda tensor: _resized(tensor, samples, REAL_SAMPLES))
    module = copy.deepcopy(build) if isinstance(build, nn.Module) else _built(build)
    return measure(module.cpu().train(), batch, REAL_SAMPLES)


RUNS: dict[str, Any] = {"fake": _on_fake, "real": _on_real}


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    module = build()
    if not isinstance(module, nn.Module):
        raise JobError(f"model() of the job returned {type(module).__name__}; it must return an nn.Module.")
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Without the traceback that torch logs when an operator has no fake form: the next attempt needs none; and without
    its warning about copies of fake tensors, which a job's model() may well make."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        logger.disabled = before


def _resized(tensor: Tensor, samples: int, wanted: int) -> Tensor:
    """`wanted` samples on the CPU, the tensor's own over and over; a tensor without a batch dimension as it is."""
    tensor = tensor.detach().cpu()
    if not tensor.ndim or tensor.shape[0] != samples:
        return tensor
    return tensor[torch.arange(wanted) % samples]


def _empty_copy(module: nn.Module) -> nn.Module:
    """The module with fake parameters and buffers of the same shapes and ties, inside a fake mode."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="cpu")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="cpu")
    return copy.deepcopy(module, memo)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        mapped = [_map_tensors(inner, change) for inner in value]
        named = isinstance(value, tuple) and type(value) is not tuple
        return type(value)(*mapped) if named else type(value)(mapped)
    return value


def _cannot_run(errors: dict[str, Exception], example: Any) -> JobError:
    real, fake = errors["real"], errors["fake"]
    return JobError(
        f"the model cannot be profiled: {type(real).__name__}: {_first_line(real)} (and on fake tensors: "
        f"{type(fake).__name__}: {_first_line(fake)}). Its input was one batch of "
        f"{describe(example) or type(example).__name__}. Make model() build a module whose forward takes that, or "
        "give the job forward=lambda model, batch: ..."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
