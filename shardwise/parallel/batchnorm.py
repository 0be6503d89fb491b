"""Batch norms over all replicas: the statistics are those of the whole batch, also on the CPU and for uneven ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.comm.collectives import broadcast_all
from shardwise.comm.group import Group
from shardwise.errors import JobError

FORWARD, BACKWARD, DONE = 1, 2, 0


def batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a module by name."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {name: m for name, m in module.named_modules() if isinstance(m, kinds)}


class BatchNormSync:
    """Replaces the forward of batch norms; parameters, buffers and names stay. It has a group and an order of its own.

    When ranks have different numbers of microbatches, a rank that has run out stands in: the first rank that still
    computes announces each exchange, and the others answer with zero samples.
    """

    def __init__(self, norms: dict[str, _BatchNorm], group: Group, device: torch.device) -> None:
        self._norms = norms
        self._group = group
        self._device = device
        self._counts = [0] * group.size()
        self._announcing = False
        self._open()

    def _open(self) -> None:
        for norm in self._norms.values():
            norm.forward = functools.partial(torch.compiler.disable(self._normalise), norm)  # type: ignore[method-assign]

    @property
    def ragged(self) -> bool:
        """Whether ranks have different numbers of microbatches in this step."""
        return len(set(self._counts)) > 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this block norms are as they were, of this rank alone."""
        self.close()
        try:
            yield
        finally:
            self._open()

    def begin(self, micros: int) -> None:
        """Start a step with `micros` microbatches on this rank. Collective."""
        counts = torch.zeros(self._group.size(), dtype=torch.int64, device=self._device)
        counts[self._group.rank()] = micros
        self._group.all_reduce(counts).wait()
        self._counts = counts.tolist()
        self._announcing = False

    def begin_micro(self, index: int) -> None:
        self._announcing = index >= min(self._counts)

    def end_micro(self, index: int) -> None:
        if self._announcing:
            self._announce(DONE, 0, torch.float32)
        self._announcing = False

    def stand_in(self, done: int) -> None:
        """Take part in the microbatches that others still have after this rank's `done`; running statistics agree then.
        Collective, also for ranks that have none left."""
        for _ in range(done, max(self._counts)):
            while True:
                kind, width, wide = self._announce(DONE, 0, torch.float32)
                if kind == DONE:
                    break
                row = torch.zeros(width, dtype=torch.float64 if wide else torch.float32, device=self._device)
                if kind == FORWARD:
                    self._gather(row)
                else:
                    self._group.all_reduce(row).wait()
        if self.ragged:
            buffers = [buffer for norm in self._norms.values() for buffer in norm.buffers()]
            broadcast_all(buffers, self._group, root=self._lead)

    @property
    def _lead(self) -> int:
        """The first of the ranks with the most microbatches."""
        return self._counts.index(max(self._counts))

    def close(self) -> None:
        """Give every batch norm its own forward back."""
        for norm in self._norms.values():
            del norm.forward

    def statistics(self, row: Tensor) -> Tensor:
        """Every rank's row `[count, means, sums of squares about them]`, below each other."""
        if self._announcing:
            self._announce(FORWARD, row.numel(), row.dtype)
        return self._gather(row)

    def sums(self, row: Tensor) -> Tensor:
        """The row summed over ranks, in place."""
        if self._announcing:
            self._announce(BACKWARD, row.numel(), row.dtype)
        self._group.all_reduce(row).wait()
        return row

    def _gather(self, row: Tensor) -> Tensor:
        table = row.new_empty(self._group.size() * row.numel())
        self._group.all_gather_single(table, row).wait()
        return table.view(self._group.size(), -1)

    def _announce(self, kind: int, width: int, dtype: torch.dtype) -> list[int]:
        head = torch.tensor([kind, width, int(dtype == torch.float64)], dtype=torch.int64, device=self._device)
        self._group.broadcast([head], root=self._lead).wait()
        said: list[int] = head.tolist()
        return said

    def _normalise(self, norm: _BatchNorm, input: Tensor) -> Tensor:
        norm._check_input_dim(input)
        if not norm.training:
            return type(norm).forward(norm, input)
        output: Tensor
        output, mean, variance, count = _Normalise.apply(input, norm.weight, norm.bias, norm.eps, self)
        if norm.track_running_stats and norm.running_mean is not None:
            _update(norm, mean, variance, float(count))
        return output


def _update(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: float) -> None:
    """Running statistics as torch keeps them: the unbiased variance, and a cumulative average without momentum."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    with torch.no_grad():
        unbiased = variance * (count / (count - 1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum or 0.0)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum or 0.0)


class _Normalise(torch.autograd.Function):
    """Batch normalisation (Ioffe and Szegedy 2015) over the samples of all ranks. Shapes: input [N, C, ...]."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sync: BatchNormSync
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind = torch.float64 if input.dtype == torch.float64 else torch.float32
        x = input.to(kind)
        dims = [d for d in range(x.dim()) if d != 1]
        channels, count = x.shape[1], x.numel() // max(1, x.shape[1])
        own_mean = x.mean(dims) if count else x.new_zeros(channels)
        own_squares = (x - _spread(own_mean, x)).square().sum(dims)
        table = sync.statistics(torch.cat([x.new_tensor([float(count)]), own_mean, own_squares]))
        counts, means, squares = table[:, :1], table[:, 1 : channels + 1], table[:, channels + 1 :]
        total = counts.sum()
        if float(total) < 2:
            raise JobError(
                f"a batch norm got one value for each of its {channels} channels over all ranks, from which no "
                "variance can be taken. Raise global_batch, or use a norm over features such as GroupNorm."
            )
        mean = (means * counts).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total  # Chan et al. 1979
        scale = torch.rsqrt(variance + eps)
        normal = (x - _spread(mean, x)) * _spread(scale, x)
        ctx.save_for_backward(normal, scale, weight, total)
        ctx.sync, ctx.has_bias = sync, bias is not None
        ctx.set_materialize_grads(False)
        output = normal if weight is None else normal * _spread(weight.to(kind), x)
        output = output if bias is None else output + _spread(bias.to(kind), x)
        result = output.to(input.dtype)
        ctx.mark_non_differentiable(mean, variance, total)
        return result if result is not normal else normal.clone(), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
        normal, scale, weight, total = ctx.saved_tensors
        g = grad.to(normal.dtype)
        dims = [d for d in range(g.dim()) if d != 1]
        sums = torch.cat([g.sum(dims), (g * normal).sum(dims)])
        own_bias, own_weight = (part.clone() for part in sums.chunk(2))
        mean_g, mean_gn = (ctx.sync.sums(sums) / total).chunk(2)
        gain = scale if weight is None else scale * weight.to(normal.dtype)
        input_grad = (g - _spread(mean_g, g) - normal * _spread(mean_gn, g)) * _spread(gain, g)
        grads_weight = own_weight.to(weight.dtype) if weight is not None else None
        return input_grad.to(grad.dtype), grads_weight, own_bias if ctx.has_bias else None, None, None


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...]."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
