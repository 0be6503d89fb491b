"""`Pipeline`: this rank's stages of a module, run by torch's schedules. What knows their inside is in this file alone.

GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019), interleaved 1F1B (Narayanan et al. 2021), zero-bubble and ZBV
(Qi et al. 2023); and, to compare them with, one microbatch after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._utils import extract_tensor_metas
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo

from shardwise.models.cuts import Part, made
from shardwise.models.dataflow import Dataflow
from shardwise.parallel.flows import Route
from shardwise.parallel.stage import generator_state
from shardwise.spec.layout import stage_rank
from shardwise.spec.plan import Plan

Compute = Callable[[int, int, Sequence[Tensor]], Any]  # (stage, chunk, what came) -> what leaves, a scalar in the end
Span = Callable[[str, int, int], contextlib.AbstractContextManager[None]]  # (kind, stage, chunk): around what is timed
Kept = Callable[[int], Collection[str]]  # stage -> the names of its parameters
Reduce = Callable[[int], None]  # told the number of a stage whose gradients are complete
NAIVE = "naive"
SINGLE: dict[str, Any] = {NAIVE: ScheduleGPipe, "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Micro(NamedTuple):
    """A microbatch and its route."""

    batch: Any
    route: Route


def stages_of(place: int, plan: Plan) -> list[int]:
    """The numbers of the stages that `place` on the pipeline axis runs."""
    return [number for number in range(plan.pipeline * plan.virtual) if stage_rank(number, plan) == place]


class Pipeline:
    """The stages `numbers` of `count` under a schedule; `group` are the ranks of the pipeline.

    `kept(stage)` are the names of a stage's parameters (all by default). `compute(stage, chunk, received)` runs a stage
    on microbatch `chunk`; `reduce(stage)` is called when all gradients of a stage are there, and `gather()` before a
    backward that puts off gradients of parameters, which must be the module's own then.
    """

    def __init__(
        self,
        module: nn.Module,
        numbers: Sequence[int],
        count: int,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        schedule: str,
        compute: Compute,
        reduce: Reduce = lambda number: None,
        gather: Callable[[], None] = lambda: None,
        span: Span = lambda kind, number, chunk: contextlib.nullcontext(),
        kept: Kept | None = None,
    ) -> None:
        self._schedule = schedule
        self._count = count
        self._ranks = group.size()
        self._runners: dict[int, Any] = {}
        self._pieces = [
            _Piece(module, number, count, group, device, compute, reduce, gather, span, kept and kept(number))
            for number in numbers
        ]

    def step(self, micros: Sequence[Micro]) -> None:
        """Forward and backward of all microbatches, of which there are as many on all ranks of the pipeline.

        Gradients are added to `.grad`. A schedule that cannot do with so many gives way to a plainer one.
        """
        if self._schedule == NAIVE:
            for number, one in enumerate(micros):
                self._run([one], first=number, last=number + 1 == len(micros))
        elif micros:
            self._run(micros, first=0, last=True)

    def _run(self, micros: Sequence[Micro], *, first: int, last: bool) -> None:
        for piece in self._pieces:
            piece.expect(micros, first=first, last=last)
        with _unwrapped():
            self._runner(len(micros))._step_microbatches(
                [()] * len(micros),
                [{"chunk": chunk} for chunk in range(len(micros))],
                [None] * len(micros),
                [],
                return_outputs=False,
            )

    def _runner(self, micros: int) -> Any:
        if micros not in self._runners:
            kind = self._kind(micros)
            pieces = self._pieces[0] if self._schedule in SINGLE else self._pieces
            runner = kind(pieces, micros, loss_fn=lambda output, target: output, scale_grads=False)
            runner._stage_forward_initialized = runner._stage_backward_initialized = True
            runner._stages_forward_initialized = runner._stages_backward_initialized = True
            self._runners[micros] = runner
        return self._runners[micros]

    def _kind(self, micros: int) -> Any:
        if self._schedule == "1f1b" and micros < self._count:
            return ScheduleGPipe
        if self._schedule in ("interleaved", "zero_bubble") and micros % max(1, micros // self._ranks):
            return ScheduleLoopedBFS
        return SINGLE.get(self._schedule) or SEVERAL[self._schedule]


class _Piece(_PipelineStageBase):
    """One stage as torch's schedules see it. Every microbatch may have a shape of its own."""

    def __init__(
        self,
        module: nn.Module,
        number: int,
        count: int,
        group: dist.ProcessGroup,
        device: torch.device,
        compute: Compute,
        reduce: Reduce,
        gather: Callable[[], None],
        span: Span,
        kept: Collection[str] | None,
    ) -> None:
        super().__init__(_Kept(module, kept), number, count, device, group)
        self._module = module
        self._compute = compute
        self._reduce = reduce
        self._gather = gather
        self._span = span
        self._runtime_validate = False  # it knows one shape for all microbatches
        self._grads: list[Any] = []
        self._follow: list[bool] = []  # whether the gradients of parameters may be put off
        self._done: set[int] = set()  # microbatches whose whole backward came first
        self._routes: list[Route] = []
        self._first = 0
        self._last = True

    def expect(self, micros: Sequence[Micro], *, first: int, last: bool) -> None:
        """Be ready for these microbatches, of which the first is number `first` of the step, the last perhaps its last;
        buffers are kept while their shapes are those of the run before."""
        self.has_backward = True
        self.clear_runtime_states()
        self._done.clear()
        self._first, self._last = first, last
        self.chunks = len(micros)
        before, self._routes = self._routes, [one.route for one in micros]
        if len(before) == len(micros) and all(a is b for a, b in zip(before, self._routes, strict=True)):
            return
        self.grad_send_info = None
        self.args_recv_info, self.grad_recv_info = {}, {}
        self._grads, self._follow = [], []
        for chunk, route in enumerate(self._routes):
            self._prepare(chunk, route)

    def _prepare(self, chunk: int, route: Route) -> None:
        part, source, target = route.parts[self.stage_index], self.stage_index - 1, self.stage_index + 1
        self._follow.append(all_follow(route.flow, part, self._module))
        inputs = [] if self.is_first else received(route, self.stage_index, self.device)
        outputs = [] if self.is_last else received(route, self.stage_index + 1, self.device)
        self.act_send_info = {0: []} if self.is_last else {index: [target] for index in range(len(outputs))}
        self.args_recv_info[chunk] = tuple(_RecvInfo("activation", source, t, _meta(t)) for t in inputs)
        grads = [t.detach() if t.requires_grad else None for t in outputs]
        self.grad_recv_info[chunk] = tuple(
            _RecvInfo("gradient", target, t, None if t is None else _meta(t)) for t in grads
        )
        self._grads.append(tuple(_meta(t.detach()) if t.requires_grad else None for t in inputs))
        self._stage_meta.inputs = tuple(_meta(t) for t in inputs)
        for tensor in inputs:
            tensor.requires_grad_(False)

    def forward_maybe_with_nosync(self, *received: Any, **given: Any) -> Any:
        found = self._compute(self.stage_index, self._first + given["chunk"], received)
        return found.clone() if self.is_last and found._is_view() else found  # schedules detach it in place

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self._last:
            self._reduce(self.stage_index)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Zero-bubble schedules ask for the inputs' gradients first. torch finds the parameters whose gradients are
        then left on the way from an input that requires one, so a stage that has others does all of backward at once.
        """
        at_once = full_backward or not self._follow[bwd_chunk_id]
        if not at_once:
            self._gather()
        with self._span("backward", self.stage_index, self._first + bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward=at_once, last_backward=last_backward)
        if at_once and not full_backward:
            self._done.add(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if bwd_chunk_id in self._done:
            self._done.remove(bwd_chunk_id)
        else:
            with self._span("weights", self.stage_index, self._first + bwd_chunk_id):
                super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._stage_meta.input_grads = self._grads[bwd_chunk_id]
        grads = self.bwd_cache.get(bwd_chunk_id, ())  # zero-bubble's are as autograd left them
        self.bwd_cache[bwd_chunk_id] = tuple(None if grad is None else grad.contiguous() for grad in grads)
        return super().get_bwd_send_ops(bwd_chunk_id)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("`expect` has prepared it")

    _prepare_backward_infra = _create_grad_recv_info = _prepare_forward_infra


class _Kept(nn.Module):
    """What torch's stages ask a module for, many times a step: its parameters, here those of one stage. Those of
    another may be a rank's rows by then, which nothing may read."""

    def __init__(self, module: nn.Module, kept: Collection[str] | None) -> None:
        super().__init__()
        names = [name for name, _ in module.named_parameters() if kept is None or name in kept]
        paths = [name.rpartition(".") for name in names]
        self._places: list[Any] = [(module.get_submodule(path)._parameters, key) for path, _, key in paths]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameters[key] for parameters, key in self._places)


def all_follow(flow: Dataflow, part: Part, module: nn.Module) -> bool:
    """Whether all that is trained in a stage after the first is computed with something received that needs a gradient.
    (The first stage receives nothing, and torch's way with it is another.)
    """
    if part.first == 0:
        return True
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    following = {value for value in part.receives if made(flow, value).requires_grad}
    for number in range(part.first, part.last + 1):
        needs = flow.calls[number].needs
        if following & needs.values:
            following |= {(number, index) for index in range(len(flow.calls[number].leaves))}
        elif trained & needs.tensors:
            return False
    return True


def received(route: Route, stage: int, device: torch.device) -> list[Tensor]:
    """Where what a stage takes in is received."""
    found = []
    for value in route.parts[stage].receives:
        leaf = made(route.flow, value)
        found.append(torch.empty(leaf.shape, dtype=leaf.dtype, device=device, requires_grad=leaf.requires_grad))
    return [*found, torch.empty_like(generator_state(device))] if route.flow.random else found


def _meta(tensor: Tensor) -> Any:
    found = extract_tensor_metas((tensor,))
    assert found is not None
    return found[0]


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """torch wraps what a stage's forward raises; it passes through as it was."""
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is not None and "failed to run forward" in str(error):
            raise error.__cause__ from None
        raise
