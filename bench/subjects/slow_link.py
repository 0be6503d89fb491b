"""A plain PyTorch loop over a slow link: DistributedDataParallel, with or without one of its hooks, or alone."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from bench import work
from bench.line import serve
from bench.slow_case import SlowCase
from bench.slow_work import HeldOut, Ordered, set_rate

ONE_BUCKET_MB = 1000


def alone(module: nn.Module, case: SlowCase) -> nn.Module:
    """Nothing is ever sent: what a link could do at its very best."""
    return module


def ddp(module: nn.Module, case: SlowCase) -> nn.Module:
    return DistributedDataParallel(module, **work.DDP_OPTIONS)


def fp16(module: nn.Module, case: SlowCase) -> nn.Module:
    model = DistributedDataParallel(module, **work.DDP_OPTIONS)
    model.register_comm_hook(None, fp16_compress_hook)
    return model


def powersgd(module: nn.Module, case: SlowCase) -> nn.Module:
    """With several buckets the hook hangs on gloo: its second all-reduces start in another order on each rank."""
    model = DistributedDataParallel(module, bucket_cap_mb=ONE_BUCKET_MB, **work.DDP_OPTIONS)
    state = PowerSGDState(
        process_group=None,
        matrix_approximation_rank=case.settings["rank"],
        start_powerSGD_iter=case.settings["start"],
    )
    model.register_comm_hook(state, powerSGD_hook)
    return model


WAYS = {"alone": alone, "ddp": ddp, "fp16": fp16, "powersgd": powersgd}


def main() -> None:
    case = SlowCase.from_environment()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    way = case.settings["way"]
    if way != "alone":
        dist.init_process_group("gloo")
    module = work.model(case)
    model = WAYS[way](module, case)
    optimizer = work.optimizer(case, model.parameters())
    batches, held_out = Ordered(case, rank), HeldOut(case)
    done = 0

    def step() -> float:
        nonlocal done
        batch = batches[done]
        set_rate(optimizer, case.rate(done))
        optimizer.zero_grad()
        loss = work.loss(model(batch["tokens"]), batch)
        loss.backward()
        optimizer.step()
        done += 1
        return loss.item()

    serve(
        step,
        rank=rank,
        world=world,
        checksum=lambda: work.checksum(module),
        evaluate=lambda: held_out.loss(module),
    )
    if way != "alone":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
