"""`Pipeline`: this rank's stages of a module, run by torch's schedules. What knows their inside is in this file alone.

GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019), interleaved 1F1B (Narayanan et al. 2021), zero-bubble and ZBV
(Qi et al. 2023); and, to compare them with, one microbatch after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo

from shardwise.parallel.dataflow import Dataflow, Forward, Made, Value
from shardwise.parallel.stage import Part, Stage
from shardwise.spec.layout import stage_rank
from shardwise.spec.plan import Plan

Head = Callable[[Any, Any], Tensor]  # (output, batch) -> what backward begins with, a scalar
NAIVE = "naive"
SINGLE: dict[str, Any] = {NAIVE: ScheduleGPipe, "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
SEVERAL: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Micro(NamedTuple):
    """A microbatch, and how values flow in one of its shape."""

    batch: Any
    flow: Dataflow


def stages_of(place: int, plan: Plan) -> list[int]:
    """The numbers of the stages that `place` on the pipeline axis runs."""
    return [number for number in range(plan.pipeline * plan.virtual) if stage_rank(number, plan) == place]


class Pipeline:
    """`stage` has this rank's parts, which are `numbers` of `count` stages; `group` are the ranks of the pipeline."""

    def __init__(
        self,
        stage: Stage,
        numbers: Sequence[int],
        count: int,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        schedule: str,
        head: Head,
        forward: Forward | None = None,
    ) -> None:
        self._schedule = schedule
        self._pieces = [
            _Piece(stage, part, number, count, group, device, head, forward) for part, number in enumerate(numbers)
        ]

    def step(self, micros: Sequence[Micro]) -> list[Tensor]:
        """Forward and backward of all microbatches, which are the same on all ranks of the pipeline.

        Gradients are added to `.grad`; the rank of the last stage gets what `head` returned, the others nothing.
        """
        if self._schedule == NAIVE:
            return [value for one in micros for value in self._run([one])]
        return self._run(micros)

    def _run(self, micros: Sequence[Micro]) -> list[Tensor]:
        for piece in self._pieces:
            piece.expect(micros)
        kind = SINGLE.get(self._schedule) or SEVERAL[self._schedule]
        pieces = self._pieces[0] if self._schedule in SINGLE else self._pieces
        runner = kind(pieces, len(micros), loss_fn=lambda output, target: output, scale_grads=False)
        runner._stage_forward_initialized = runner._stage_backward_initialized = True
        runner._stages_forward_initialized = runner._stages_backward_initialized = True
        values: list[Tensor] = []
        with _unwrapped():
            runner._step_microbatches(
                [()] * len(micros),
                [{"chunk": chunk} for chunk in range(len(micros))],
                [None] * len(micros),
                values,
                return_outputs=False,
            )
        return [value.detach() for value in values]


class _Piece(_PipelineStageBase):
    """One stage as torch's schedules see it. Every microbatch may have a shape of its own."""

    def __init__(
        self,
        stage: Stage,
        part: int,
        number: int,
        count: int,
        group: dist.ProcessGroup,
        device: torch.device,
        head: Head,
        forward: Forward | None,
    ) -> None:
        super().__init__(stage.module, number, count, device, group)
        self._stage = stage
        self._number = part
        self._part: Part = stage.parts[part]
        self._head = head
        self._forward = forward
        self._runtime_validate = False  # it knows one shape for all microbatches
        self._grads: list[Any] = []
        self._follow: list[bool] = []  # whether the gradients of parameters may be put off
        self._done: set[int] = set()  # microbatches whose whole backward came first
        self._micros: list[Micro] = []

    def expect(self, micros: Sequence[Micro]) -> None:
        """Be ready for these microbatches; buffers are kept while their shapes are those of the step before."""
        self.has_backward = True
        self.clear_runtime_states()
        self._done.clear()
        self.chunks = len(micros)
        before, self._micros = self._micros, list(micros)
        if len(before) == len(micros) and all(a.flow is b.flow for a, b in zip(before, micros, strict=True)):
            return
        self.grad_send_info = None
        self.args_recv_info, self.grad_recv_info = {}, {}
        sends = {i: [self.stage_index + 1] for i in range(len(self._part.sends))}
        self.act_send_info = {0: []} if self.is_last else sends
        self._grads = []
        self._follow = [all_follow(flow, self._part, self.submod) for _, flow in micros]
        for chunk, (_, flow) in enumerate(micros):
            inputs = [_empty(flow, value, self.device) for value in self._part.receives]
            outputs = [_empty(flow, value, self.device) for value in self._part.sends]
            source, target = self.stage_index - 1, self.stage_index + 1
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
        micro = self._micros[given["chunk"]]
        found = self._stage.run(self._number, micro.batch, received, flow=micro.flow, forward=self._forward)
        if not self.is_last:
            return found
        value = self._head(found, micro.batch)
        return value.clone() if value._is_view() else value  # schedules detach it in place

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Zero-bubble schedules ask for the inputs' gradients first. torch finds the parameters whose gradients are
        then left on the way from an input that requires one, so a stage that has others does all of backward at once.
        """
        at_once = full_backward or not self._follow[bwd_chunk_id]
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward=at_once, last_backward=last_backward)
        if at_once and not full_backward:
            self._done.add(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if bwd_chunk_id in self._done:
            self._done.remove(bwd_chunk_id)
        else:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._stage_meta.input_grads = self._grads[bwd_chunk_id]
        grads = self.bwd_cache.get(bwd_chunk_id, ())  # zero-bubble's are as autograd left them
        self.bwd_cache[bwd_chunk_id] = tuple(None if grad is None else grad.contiguous() for grad in grads)
        return super().get_bwd_send_ops(bwd_chunk_id)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("`expect` has prepared it")

    _prepare_backward_infra = _create_grad_recv_info = _prepare_forward_infra


def all_follow(flow: Dataflow, part: Part, module: nn.Module) -> bool:
    """Whether all that is trained in a stage after the first is computed with something received that needs a gradient.
    (The first stage receives nothing, and torch's way with it is another.)
    """
    if part.first == 0:
        return True
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    following = {value for value in part.receives if _made(flow, value).requires_grad}
    for number in range(part.first, part.last + 1):
        needs = flow.calls[number].needs
        if following & needs.values:
            following |= {(number, index) for index in range(len(flow.calls[number].leaves))}
        elif trained & needs.tensors:
            return False
    return True


def _made(flow: Dataflow, value: Value) -> Made:
    number, index = value
    leaf = flow.calls[number].leaves[index]
    assert isinstance(leaf, Made), value
    return leaf


def _empty(flow: Dataflow, value: Value, device: torch.device) -> Tensor:
    """Where a value of this flow is received."""
    leaf = _made(flow, value)
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=device, requires_grad=leaf.requires_grad)


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
