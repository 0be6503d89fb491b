"""Plain DistributedDataParallel under torchrun, as in PyTorch's own tutorial."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from bench import work
from bench.case import Case
from bench.line import serve


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if case.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if case.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    module = work.model(case).to(device)
    model = DistributedDataParallel(module, **work.DDP_OPTIONS)
    optimizer = work.optimizer(case, model.parameters())
    tokens = work.ordered_tokens(case)
    loader = DataLoader(tokens, batch_size=case.batch, sampler=DistributedSampler(tokens, shuffle=False))
    batches = iter(loader)

    def step() -> float:
        batch = work.on_device(next(batches), device)
        optimizer.zero_grad()
        with work.autocast(case):
            loss = work.loss(model(batch["tokens"]), batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(step, rank=rank, world=world, checksum=lambda: work.checksum(module))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
