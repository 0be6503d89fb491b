"""One step of DistributedDataParallel under torchrun."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from bench import work
from bench.case import Case
from bench.stamp import stamp


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(work.model(case), **work.DDP_OPTIONS)
    optimizer = work.optimizer(case, model.parameters())
    tokens = work.ordered_tokens(case)
    batch = next(iter(DataLoader(tokens, case.batch, sampler=DistributedSampler(tokens, shuffle=False))))
    loss = work.loss(model(batch["tokens"]), batch)
    loss.backward()
    optimizer.step()
    loss.item()
    stamp(dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
