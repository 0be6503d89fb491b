"""Hugging Face Accelerate under `accelerate launch`: model, optimizer and loader go through `prepare`."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from bench import work
from bench.case import Case
from bench.line import serve


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=case.device == "cpu",
        mixed_precision="no" if case.precision == "float32" else "bf16",
        kwargs_handlers=[DistributedDataParallelKwargs(**work.DDP_OPTIONS)],
    )
    module = work.model(case)
    plain = DataLoader(work.ordered_tokens(case), batch_size=case.batch)
    model, optimizer, loader = accelerator.prepare(module, work.optimizer(case, module.parameters()), plain)
    batches = iter(loader)

    def step() -> float:
        batch = next(batches)
        optimizer.zero_grad()
        loss = work.loss(model(batch["tokens"]), batch)
        accelerator.backward(loss)
        optimizer.step()
        return loss.item()

    serve(
        step,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        checksum=lambda: work.checksum(module),
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
