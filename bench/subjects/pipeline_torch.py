"""torch.distributed.pipelining by hand under torchrun: two stage modules, `PipelineStage` and a schedule."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.data import DataLoader

from bench import staged, work
from bench.case import Case
from bench.line import serve

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = staged.whole(case)
    (blocks,) = staged.first_blocks(case, world)
    module = staged.Begin(model, blocks) if rank == 0 else staged.End(model, blocks)
    del model
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = SCHEDULES[sys.argv[1]](stage, staged.MICROBATCHES, loss_fn=staged.mean_loss)
    optimizer = work.optimizer(case, module.parameters())
    batches = iter(DataLoader(work.ordered_tokens(case), batch_size=case.global_batch))

    def step() -> float:
        batch = next(batches)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        if rank == 0:
            schedule.step(batch["tokens"])
        else:
            schedule.step(target=batch["targets"], losses=losses)
        optimizer.step()
        mean = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.broadcast(mean, world - 1)  # a training loop on rank 0 shows its loss
        return mean.item()

    serve(step, rank=rank, world=world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
