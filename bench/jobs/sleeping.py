"""A model whose work is sleep, so that more ranks than cores do it at once: what is idle beside it is the schedule's.

A block sleeps for some seconds in forward, as long for the gradient of its input, and as long for that of its weight.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import shardwise as sw
from bench.served import Served

BLOCKS, MICROBATCHES, WIDTH = 8, 8, 16


class _Data(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block_s: float) -> Tensor:
        ctx.block_s = block_s
        time.sleep(block_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.block_s)
        return grads[0], None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, block_s: float) -> Tensor:
        ctx.block_s = block_s
        return weight.expand_as(x).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.block_s)
        return grads[0].sum().view(1), None, None


class Block(nn.Module):
    """The little that it computes makes all blocks weigh the same to the planner."""

    def __init__(self, block_s: float) -> None:
        super().__init__()
        self.block_s = block_s
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Data.apply(self.mix(x), self.block_s) + _Weight.apply(self.weight, x.detach(), self.block_s)
        return out


class Sleeper(nn.Module):
    """float32 [B, WIDTH] -> the same."""

    def __init__(self, block_s: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(block_s) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(torch.is_grad_enabled())  # else the first block would sleep less
        for block in self.blocks:
            x = block(x)
        return x


def loss(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """The sum of squares, and the number of elements."""
    return output.square().sum(), output.new_tensor(float(output.numel()))


def job(block_s: float = 0.048) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: Sleeper(block_s),
        loss=loss,
        data=sw.arrays({"x": torch.ones(4 * MICROBATCHES, WIDTH)}),
        optimizer=sw.sgd(lr=1e-6, momentum=0.0),
        global_batch=MICROBATCHES,
        steps=10**9,
        callbacks=(Served(lambda: 0.0),),
        save_every=0,
    )
