"""How parameters follow their gradients: by the optimizers as they are, or piece by piece, so that little is in memory.

    for each piece of each parameter:   read its states (the next piece's are on their way) -> float32
                                        -> one step of the job's own optimizer on this piece alone
                                        -> back into their format, and to where they lie

So a parameter's master, and what the optimizer remembers of it, may be in fewer bits, in host memory or on disk.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from shardwise.errors import JobError
from shardwise.models.blocks import find_blocks, num_parameters
from shardwise.parallel.low_bit import UNSIGNED, dequantize, round_by_chance
from shardwise.parallel.parts import Part
from shardwise.parallel.pieces import works_on_pieces
from shardwise.parallel.slots import CODES, QUANTUM, SCALES, Slot, Slots, Wide, flat, shaped
from shardwise.parallel.spill import Spill
from shardwise.plan.formats import updates_in_pieces
from shardwise.spec.layout import has_master_rows
from shardwise.spec.plan import Plan

Named = Sequence[tuple[str, nn.Parameter]]
Optimizers = Sequence[torch.optim.Optimizer]
MOST = 1 << 20  # elements of a piece


class Updates:
    """The optimizers as they are."""

    def __init__(self, named: Named = (), part: Part | None = None) -> None:
        self._names = {id(p): name for name, p in named}
        self._part = part or Part()

    def step(self, optimizers: Optimizers) -> None:
        """Every parameter that has a gradient follows it."""
        for optimizer in optimizers:
            optimizer.step()

    @contextlib.contextmanager
    def shown(self, optimizers: Optimizers) -> Iterator[None]:
        """In this block the module and the optimizers hold what a checkpoint has, to save it or to load another."""
        yield

    def widen(self, optimizers: Optimizers) -> None:
        """States that were loaded from another plan's formats are in the parameters' own from now on."""
        for optimizer in optimizers:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, dict) and self._part.cut:
                        wide = self._part.widened(self._names[id(p)], value, signed=key not in UNSIGNED)
                        state[key] = wide.to(p.dtype)
                    elif isinstance(value, dict):
                        wide = dequantize(flat(value[CODES]), value[SCALES], signed=key not in UNSIGNED)
                        state[key] = shaped(wide.to(p.dtype), p)
                    elif _is_state(value, self._part.rows(p.data).shape):
                        state[key] = value.to(p.dtype)

    def empty(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Memory for a state of this parameter that is to be loaded."""
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)

    def state(self) -> dict[str, int]:
        """Plain data that a checkpoint keeps."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def gather(self) -> None:
        """The parameters have the format that they were built in, for good. Collective."""

    def close(self) -> None:
        """Parameters are as they were built."""


class _Kept:
    """What is known of one parameter between two steps."""

    def __init__(self, name: str, parameter: nn.Parameter, *, large: bool) -> None:
        self.name, self.parameter, self.large = name, parameter, large
        self.built = parameter.dtype
        self.master: Slot | None = None
        self.slots: dict[Any, Slot] = {}  # by the optimizer's name for the state
        self.rest: dict[Any, Any] = {}  # what it keeps beside: counts of steps and the like
        self.before: dict[Any, Any] = {}  # that, as it was before this step
        self.known: set[Any] = set()  # the slots there were before this step
        self.like: Tensor = parameter  # has the shape of the states: with a shard axis, of this rank's rows


class _Piece(NamedTuple):
    """Elements `start` to `stop` of a parameter, in the order of memory."""

    kept: _Kept
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    start: int
    stop: int

    def fetch(self) -> dict[Any, Any]:
        slots = dict(self.kept.slots) | ({None: self.kept.master} if self.kept.master is not None else {})
        return {key: slot.fetch(self.start, self.stop) for key, slot in slots.items()}


def _refuse_gaps(name: str, p: Tensor) -> None:
    """Raise JobError for a parameter whose elements do not lie side by side: pieces of it would be others' memory."""
    least = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1):
        if stride != least:
            raise JobError(
                f"'{name}' is a view of a larger tensor, so that the plan's states, parameters or offload.optimizer "
                "cannot take it in pieces. Build it with .contiguous(), or leave them out of the plan."
            )
        least *= size


class PiecewiseUpdates(Updates):
    """States in the plan's formats and places. `folder` is where a file may lie.

    What belongs to parameters of fewer than `QUANTUM` elements, or of one dimension (biases, scales), stays in memory
    in float32. Under `parameters=bfloat16` the module has bfloat16 from now on, norms with running statistics left
    out: torch has them in float32 only. Random numbers for rounding follow from
    the number of updates, the parameter's name and which part of it this is, so that they are the same on every
    replica and after a resume. `part` says which part of the parameters this rank updates.
    """

    def __init__(
        self, module: nn.Module, named: Named, plan: Plan, folder: str | Path | None, part: Part | None = None
    ) -> None:
        super().__init__(named, part)
        self._plan, self._named, self._folder = plan, named, folder
        self._spill = Spill(folder) if plan.offload.optimizer == "disk" else None
        self._states = Slots(plan.states, plan.offload.optimizer, self._spill)
        self._masters = Slots("float32", plan.offload.optimizer, self._spill)
        largest = max((num_parameters([block]) for block in find_blocks(module).values()), default=MOST)
        self._most = max(QUANTUM, min(MOST, largest // 3) // QUANTUM * QUANTUM)
        self._plain = Slots("float32", "none", None)
        shrinking = shrinks(module, plan)
        self._kept: dict[int, _Kept] = {}
        for name, p in named:
            large = self._part.elements(name, p) >= QUANTUM and p.dim() > 1
            if large or id(p) in shrinking:
                _refuse_gaps(name, self._part.rows(p.data))
                self._kept[id(p)] = _Kept(name, p, large=large)
                self._kept[id(p)].like = torch.empty_like(self._part.rows(p.data), device="meta")
        self._cut: dict[int, bool] = {}  # whether an optimizer steps on parts of a parameter too
        self._loading: dict[int, Slot] = {}
        self._count = 0
        for kept in self._kept.values():
            if id(kept.parameter) in shrinking:
                self._shrink(kept)

    def step(self, optimizers: Optimizers) -> None:
        with contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(_hooks_once(optimizer))
            self._step(optimizers)
        self._count += 1

    def _step(self, optimizers: Optimizers) -> None:
        ready = [(o, [p for g in o.param_groups for p in g["params"] if p.grad is not None]) for o in optimizers]
        for number, (optimizer, parameters) in enumerate(ready):
            if parameters and number not in self._cut:
                self._cut[number] = works_on_pieces(optimizer, parameters)
            self._step_small(optimizer)
        pieces = [piece for number, optimizer in enumerate(optimizers) for piece in self._pieces(number, optimizer)]
        written: Future[None] | None = None
        ahead = self._ahead(pieces[0]) if pieces else None
        for place, piece in enumerate(pieces):
            assert ahead is not None
            fetched = ahead()
            first = place == 0 or pieces[place - 1].kept is not piece.kept
            if place + 1 < len(pieces):
                ahead = self._ahead(pieces[place + 1])
            flush = self._step_piece(piece, fetched, first=first)
            if self._spill is None:
                flush()
                continue
            if written is not None:
                self._spill.wait(written)
            written = self._spill.later(flush)
        if written is not None and self._spill is not None:
            self._spill.wait(written)

    def _ahead(self, piece: _Piece) -> Callable[[], dict[Any, Any]]:
        if self._spill is None:
            return piece.fetch
        spill, work = self._spill, self._spill.later(piece.fetch)
        return lambda: spill.wait(work)

    def _step_small(self, optimizer: torch.optim.Optimizer) -> None:
        """What is not kept here goes as ever."""
        before = [group["params"] for group in optimizer.param_groups]
        try:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in self._kept]
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                optimizer.step()
        finally:
            for group, parameters in zip(optimizer.param_groups, before, strict=True):
                group["params"] = parameters

    def _pieces(self, number: int, optimizer: torch.optim.Optimizer) -> Iterator[_Piece]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in self._kept or p.grad is None:
                    continue
                size = self._most if self._cut[number] and self._kept[id(p)].large else p.numel()
                for start in range(0, max(1, p.numel()), max(1, size)):  # a part may be empty
                    yield _Piece(self._kept[id(p)], optimizer, group, start, min(start + size, p.numel()))

    def _step_piece(self, piece: _Piece, fetched: dict[Any, Any], *, first: bool) -> Callable[[], None]:
        """The optimizer's step on one piece; what it returns brings the states to where they lie."""
        kept, optimizer, generator = piece.kept, piece.optimizer, self._generator(piece)
        p, start, stop = kept.parameter, piece.start, piece.stop
        if first:
            kept.before, kept.known = kept.rest, set(kept.slots)
            kept.like = torch.empty_like(p, device="meta")
        whole, gradient = p.data, p.grad
        assert gradient is not None
        if gradient.stride() != whole.stride():
            gradient = torch.empty_like(whole).copy_(gradient)
        here, cut = flat(whole)[start:stop], stop - start < p.numel()
        target = kept.master.load(start, stop, fetched[None]) if kept.master is not None else here
        target = target.to(kept.built)
        states = {key: kept.slots[key].load(start, stop, fetched[key]) for key in kept.known}
        try:
            p.grad = None
            p.data = target if cut else shaped(target, whole)
            p.grad = (flat(gradient)[start:stop] if cut else gradient).to(kept.built)
            if kept.known or kept.before:
                shown = states if cut else {key: shaped(value, whole) for key, value in states.items()}
                optimizer.state[p] = {**_copied(kept.before), **shown}
            self._alone(piece)
            if p.data.data_ptr() != target.data_ptr():  # some optimizers give a parameter another tensor
                (target if cut else shaped(target, whole)).copy_(p.data)
            found = optimizer.state.pop(p, {})
        finally:
            p.grad = None
            p.data = whole
            p.grad = gradient
        found = {key: _as(value, target if cut else whole) for key, value in found.items()}
        self._sort(piece, found, (stop - start,) if cut else whole.shape)
        stored = []
        for key, slot in kept.slots.items():
            stored.append((slot, slot.store(start, fetched.get(key), flat(found[key]), generator)))
        if kept.master is not None:
            stored.append((kept.master, kept.master.store(start, fetched[None], target, generator)))
        if target is not here:
            here.copy_(target if kept.master is not None else round_by_chance(target, generator))

        def flush() -> None:
            for slot, part in stored:
                slot.flush(start, part)

        return flush

    @staticmethod
    def _alone(piece: _Piece) -> None:
        """One step of the optimizer that sees this parameter only."""
        optimizer, groups, parameters = piece.optimizer, piece.optimizer.param_groups, piece.group["params"]
        try:
            piece.group["params"] = [piece.kept.parameter]
            optimizer.param_groups = [piece.group]
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            piece.group["params"] = parameters

    def _sort(self, piece: _Piece, found: dict[Any, Any], shape: Sequence[int]) -> None:
        """Make a slot for each new state that has the shape of the piece; the rest is kept as it is."""
        kept = piece.kept
        if piece.start == 0:
            for key, value in found.items():
                if key not in kept.slots and _is_state(value, shape):
                    kept.slots[key] = self._new_slot(kept, key, value.dtype, kept.parameter.numel())
        kept.rest = {key: value for key, value in found.items() if key not in kept.slots}

    def _new_slot(self, kept: _Kept, key: Any, dtype: torch.dtype, count: int) -> Slot:
        made = self._states if kept.large else self._plain
        return made.make(count, dtype, kept.parameter.device, signed=key not in UNSIGNED)

    def _generator(self, piece: _Piece) -> torch.Generator:
        name = piece.kept.name
        seed = zlib.crc32(f"{self._count} {name} {piece.start}{self._part.place(name)}".encode())
        return torch.Generator(piece.kept.parameter.device).manual_seed(seed)

    def _shrink(self, kept: _Kept) -> None:
        """A parameter becomes bfloat16; its numbers, where this rank updates it, go into its master, if it has one."""
        p = kept.parameter
        if self._plan.master == "float32":
            made, mine = self._masters if kept.large else self._plain, self._part.rows(p.data)
            kept.master = made.make(mine.numel(), p.dtype, p.device)
            kept.master.take(mine, torch.Generator())
        p.data = p.data.to(torch.bfloat16)

    # Checkpoints.

    @contextlib.contextmanager
    def shown(self, optimizers: Optimizers) -> Iterator[None]:
        values = self._values()
        small = [p.data for p, _ in values]
        holders = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"] if id(p) in self._kept}
        wide = Wide([slot for each in holders for slot in self._in_blocks(each)], self._folder)
        given: dict[int, dict[Any, Any]] = {}
        for each in holders:
            kept = self._kept[each]
            given[each] = {key: wide.shown(slot, kept.like) for key, slot in kept.slots.items()}
        for p, data in values:  # from here on nothing can fail
            p.data = data
        for each, optimizer in holders.items():
            kept = self._kept[each]
            if kept.slots or kept.rest:
                optimizer.state[kept.parameter] = {**kept.rest, **given[each]}
        try:
            yield
        finally:
            for each, optimizer in holders.items():
                self._take(self._kept[each], optimizer.state.pop(self._kept[each].parameter, {}), given.get(each, {}))
            for (p, _), data in zip(values, small, strict=True):
                mine = self._part.rows(data)
                if mine.data_ptr() != p.data.data_ptr():
                    mine.copy_(p.data)
                p.data = data
            self._loading.clear()
            given.clear()
            values.clear()
            wide.close()
            if self._spill is not None:
                self._spill.settle()

    def _values(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What a checkpoint has in the place of parameters: masters, of this rank's rows where it has no more of them;
        then rows of the other parameters too."""
        found = []
        for _, p in self._named:
            master, mine = self._kept[id(p)].master if id(p) in self._kept else None, self._part.rows(p.data)
            if master is not None:
                found.append((p, master.shown(mine)))
            elif has_master_rows(self._plan):
                found.append((p, mine))
        return found

    def _in_blocks(self, each: int) -> list[Slot]:
        """The states whose scales are for blocks of a part, which no other layout can use."""
        kept = self._kept[each]
        return [slot for slot in kept.slots.values() if slot.in_blocks and self._part.cut]

    def _take(self, kept: _Kept, found: dict[Any, Any], given: dict[Any, Any]) -> None:
        """What is in an optimizer's state after it has been shown: what was there, or what was loaded."""
        kept.rest = {}
        for key, value in found.items():
            if key in given and value is given[key]:
                continue
            if isinstance(value, dict) and self._part.cut:
                value = self._part.widened(kept.name, value, signed=key not in UNSIGNED)
            if isinstance(value, Tensor) and id(value) in self._loading:
                kept.slots[key] = self._loading[id(value)]
            elif isinstance(value, dict) or self._is_loaded_state(value, kept.parameter):
                dtype = kept.built if isinstance(value, dict) or value.dtype == torch.bfloat16 else value.dtype
                main = value[CODES] if isinstance(value, dict) else value
                kept.like = torch.empty_like(main, device="meta")
                kept.slots[key] = self._new_slot(kept, key, dtype, main.numel())
                kept.slots[key].take(value, torch.Generator(kept.parameter.device).manual_seed(0))
            else:
                kept.rest[key] = value

    @property
    def buffered(self) -> int:
        """Bytes of memory that what is on disk takes."""
        return self._spill.buffered if self._spill is not None else 0

    def _is_loaded_state(self, value: Any, parameter: nn.Parameter) -> bool:
        if self._plan.shard == 1:
            return _is_state(value, parameter.shape)
        rows = isinstance(value, Tensor) and value.dim() == parameter.dim()
        return rows and value.is_floating_point() and value.shape[1:] == parameter.shape[1:]

    def empty(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        kept = self._kept.get(id(parameter))
        if kept is None or not kept.large or self._spill is None or self._plan.states != "float32":
            return super().empty(parameter, dtype)
        slot = self._states.make(parameter.numel(), dtype, parameter.device)
        found: Tensor = slot.shown(parameter)
        self._loading[id(found)] = slot
        return found

    def widen(self, optimizers: Optimizers) -> None:
        return None  # `shown` has seen to it

    def state(self) -> dict[str, int]:
        return {"updates": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        self._count = int(state.get("updates", self._count))

    def gather(self) -> None:
        for kept in self._kept.values():
            if kept.master is not None and self._plan.shard > 1:
                p, mine = kept.parameter, kept.master.main.whole().to(kept.parameter.device)
                p.data, kept.master = self._part.whole(mine, p.data), None
        self._widen_parameters()

    def _widen_parameters(self) -> None:
        for kept in self._kept.values():
            p = kept.parameter
            if kept.master is not None and kept.master.main.count == p.numel():
                p.data = kept.master.shown(p).clone()
            elif p.dtype != kept.built:
                p.data = p.data.to(kept.built)
            kept.master = None

    def close(self) -> None:
        self._widen_parameters()
        if self._spill is not None:
            self._spill.close()


def updates(module: nn.Module, named: Named, plan: Plan, folder: str | Path | None, part: Part) -> Updates:
    """What the plan asks for; `named` are the parameters that this rank has."""
    return PiecewiseUpdates(module, named, plan, folder, part) if updates_in_pieces(plan) else Updates(named, part)


@contextlib.contextmanager
def _hooks_once(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What was registered to run around a step runs once around this block, and sees whole gradients."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    for hook in before.values():
        hook(optimizer, (), {})
    optimizer._optimizer_step_pre_hooks = OrderedDict()
    optimizer._optimizer_step_post_hooks = OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before, after
    for hook in after.values():
        hook(optimizer, (), {})


def _copied(values: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _is_state(value: Any, shape: Sequence[int]) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and value.shape == tuple(shape)


def shrinks(module: nn.Module, plan: Plan) -> set[int]:
    """The ids of the parameters that become bfloat16."""
    if plan.parameters != "bfloat16":
        return set()
    norms = {id(p) for part in module.modules() if isinstance(part, _NormBase) for p in part.parameters(recurse=False)}
    return {id(p) for p in module.parameters() if p.dtype == torch.float32 and p.dim() > 0 and id(p) not in norms}


def _as(value: Any, like: Tensor) -> Any:
    """A state that lies in memory in another order than the parameter, in the parameter's."""
    if not isinstance(value, Tensor) or value.shape != like.shape or value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)
