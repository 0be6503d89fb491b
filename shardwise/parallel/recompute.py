"""Activations that backward computes again instead of finding them kept, block by block (Chen et al. 2016).

    forward:   x -> [block 0] -> x -> [block 1] -> x -> ...       only what enters each block is kept
    backward:  ... block 1 runs forward again, then backward; then block 0

torch's non-reentrant checkpoint does it. A block that runs again draws the random numbers that it drew, finds its
buffers as they were, and leaves no second trace in them.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardwise.errors import JobError, SpecError
from shardwise.models.blocks import find_blocks
from shardwise.models.flops import PRODUCTS
from shardwise.parallel.batchnorm import batch_norms
from shardwise.parallel.doubles import doubled, in_doubles
from shardwise.spec.plan import Plan

TWO_BACKWARDS = ("zero_bubble", "zbv")  # schedules that go back through a graph for inputs and for weights


class Recomputed:
    """Blocks of a module whose forward keeps less, until `close`. Their names and parameters stay as they are."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self._blocks = [_Block(name, block, plan) for name, block in _chosen(module, plan).items()]
        configs: list[Any] = [getattr(part, "config", None) for part in module.modules()]
        self._caching = [config for config in configs if getattr(config, "use_cache", None) is True]
        for config in self._caching:  # a cache of keys that a block adds to would grow once more when it runs again
            config.use_cache = False
        self._open()

    def _open(self) -> None:
        for block in self._blocks:
            block.open()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this block of code the module is as it was."""
        for block in self._blocks:
            block.close()
        try:
            yield
        finally:
            self._open()

    def close(self) -> None:
        """The module runs as it did before."""
        for block in self._blocks:
            block.close()
        for config in self._caching:
            config.use_cache = True


class _Block:
    """One block, and the forward that it has meanwhile."""

    def __init__(self, name: str, module: nn.Module, plan: Plan) -> None:
        self.name = name
        self.module = module
        self._selective = plan.recompute.mode == "selective"
        self._replaced: Any = None
        self._own: Callable[..., Any] = module.forward
        tensors = [(part, key) for part in module.modules() for key in part._buffers]
        self._places = [(part, key) for part, key in tensors if part._buffers[key] is not None]
        self._empty = [place for place in tensors if place not in self._places]
        self._changing: list[tuple[nn.Module, str]] | None = None  # known after the first forward

    def open(self) -> None:
        self._replaced = vars(self.module).get("forward")  # the user's own, on this one object
        self._own = self.module.forward
        self.module.forward = self._forward

    def close(self) -> None:
        del self.module.forward
        if self._replaced is not None:
            self.module.forward = self._replaced

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._own(*args, **kwargs)
        own = partial(self._own, **kwargs)  # `checkpoint` takes some names of keyword arguments for its own
        if in_doubles(self.module):  # backward runs it again without the modes of forward
            own = partial(doubled, own)
        return checkpoint(own, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[Any, Any]:
        """What the first run and those after it run in."""
        before = _Before(self)
        if not self._selective:
            return before, _As(before)
        first, again = create_selective_checkpoint_contexts(_keeps)
        return _Both(before, first), _Both(_As(before), again)

    @property
    def watched(self) -> Sequence[tuple[nn.Module, str]]:
        """The buffers that its forward may change."""
        return self._places if self._changing is None else self._changing

    def learn(self, before: dict[tuple[nn.Module, str], Tensor], versions: Sequence[tuple[int, int]]) -> None:
        """After a first run. Raises JobError where a buffer changed that had never changed before."""
        made = [key for part, key in self._empty if part._buffers[key] is not None]
        if made:
            raise JobError(
                f"'{self.name}' makes its buffer '{made[0]}' in its forward, which recompute cannot follow. Make it "
                "where the module is built, or leave recompute out."
            )
        if self._changing is None:
            self._changing = [
                (part, key)
                for part, key in self._places
                if isinstance(part, _NormBase) or not torch.equal(before[part, key], _buffer(part, key))
            ]
        elif list(versions) != self.versions():
            raise JobError(
                f"a buffer of '{self.name}' that its first forward had left alone changed in a later one, which "
                "recompute cannot follow. Let it change from the first step on, or leave recompute out."
            )

    def versions(self) -> list[tuple[int, int]]:
        """Which buffers there are that it is not known to change, and how often they have changed."""
        known = set(self.watched) if self._changing is not None else set()
        left = [_buffer(part, key) for part, key in self._places if (part, key) not in known]
        return [(id(buffer), buffer._version) for buffer in left]


class _Before:
    """Around a block's first run: remembers what torch's checkpoint does not, buffers and Python's random numbers."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.random: Any = None
        self.buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self._versions: list[tuple[int, int]] = []

    def __enter__(self) -> None:
        self.random = _chance()
        with torch.no_grad():
            self.buffers = {place: _buffer(*place).clone() for place in self.block.watched}
        self._versions = self.block.versions()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.block.learn(self.buffers, self._versions)
            self.buffers = {place: self.buffers[place] for place in self.block.watched}


class _As:
    """Around each later run: everything is as it was before the first one, and after it as it is now."""

    def __init__(self, before: _Before) -> None:
        self._before = before
        self._random: Any = None
        self._now: dict[tuple[nn.Module, str], Tensor] = {}

    def __enter__(self) -> None:
        self._random = _chance()
        _set_chance(self._before.random)
        self._now = {(part, key): _buffer(part, key) for part, key in self._before.buffers}
        for (part, key), value in self._before.buffers.items():
            part._buffers[key] = value.clone()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for (part, key), value in self._now.items():
            part._buffers[key] = value
        _set_chance(self._random)


class _Both:
    """Two contexts as one that may be entered again, as a schedule that goes back twice does."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        self._outer.__exit__(kind, error, trace)


def recomputing(module: nn.Module, plan: Plan, *, synced_norms: bool, compile: bool) -> Recomputed | None:
    """What the plan asks for. Raises SpecError where it does not go with the module or with the rest of the plan."""
    if plan.recompute.mode == "none":
        return None
    said = f"recompute={plan.recompute.mode}"
    if compile:
        raise SpecError(f"{said} does not go with compile=True yet. Leave one of them out.")
    if plan.recompute.mode == "selective" and plan.pipeline > 1 and plan.schedule in TWO_BACKWARDS:
        raise SpecError(
            f"{said} does not go with schedule={plan.schedule}, which goes back through each block twice. Use "
            "recompute=full, or schedule=1f1b."
        )
    chosen = _chosen(module, plan)
    if synced_norms:
        for name, block in chosen.items():
            if batch_norms(block):
                raise SpecError(
                    f"{said} does not go with batch_norm='sync': '{name}' would meet the other ranks once more in "
                    "backward. Use batch_norm='local', or choose other blocks with recompute=blocks."
                )
    return Recomputed(module, plan)


def _chosen(module: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    found = find_blocks(module)
    if not found:
        raise SpecError(
            f"recompute={plan.recompute.mode}: the model has no repeated blocks, such as the children of a ModuleList, "
            "that could be computed again. Leave recompute out."
        )
    inner = [name for name in found if any(part.startswith(f"{name}.") for part in plan.blocks)]
    if plan.pipeline > 1 and inner:
        raise SpecError(
            f"recompute={plan.recompute.mode} does not go with this pipeline: it may be cut inside of '{inner[0]}', "
            "which would be computed again as a whole. Leave one of them out."
        )
    if plan.recompute.mode != "blocks":
        return found
    names = list(found)
    beyond = [number for number in plan.recompute.blocks if not 0 <= number < len(names)]
    if beyond:
        raise SpecError(
            f"recompute.blocks in the plan has {beyond[0]}, but the model's {len(names)} blocks ({names[0]} to "
            f"{names[-1]}) have the numbers 0 to {len(names) - 1}."
        )
    return {names[number]: found[names[number]] for number in sorted(set(plan.recompute.blocks))}


def _keeps(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.overloadpacket in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _chance() -> tuple[Any, Any]:
    """The states of Python's random numbers and, where somebody has imported it, numpy's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else None


def _set_chance(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


def _buffer(part: nn.Module, key: str) -> Tensor:
    found = part._buffers[key]
    assert found is not None
    return found
