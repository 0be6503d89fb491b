"""One step of Accelerate under `accelerate launch`."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from bench import work
from bench.case import Case
from bench.stamp import stamp


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**work.DDP_OPTIONS)])
    module = work.model(case)
    plain = DataLoader(work.ordered_tokens(case), batch_size=case.batch)
    model, optimizer, loader = accelerator.prepare(module, work.optimizer(case, module.parameters()), plain)
    batch = next(iter(loader))
    loss = work.loss(model(batch["tokens"]), batch)
    accelerator.backward(loss)
    optimizer.step()
    loss.item()
    stamp(accelerator.process_index)
    accelerator.end_training()


if __name__ == "__main__":
    main()
