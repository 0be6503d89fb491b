"""Lightning Fabric, which launches its own processes: `fabric.launch()`, `setup`, `setup_dataloaders`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch.utils.data import DataLoader

from bench import work
from bench.case import Case
from bench.line import serve


def main() -> None:
    case = Case.from_environment()
    fabric = Fabric(
        accelerator=case.device,
        devices=case.ranks,
        strategy=DDPStrategy(**work.DDP_OPTIONS),
        precision="32-true" if case.precision == "float32" else "bf16-mixed",
    )
    fabric.launch()
    torch.set_num_threads(1)
    module = work.model(case)
    model, optimizer = fabric.setup(module, work.optimizer(case, module.parameters()))
    loader = fabric.setup_dataloaders(DataLoader(work.ordered_tokens(case), batch_size=case.batch))
    batches: Iterator[Any] = iter(loader)

    def step() -> float:
        batch = next(batches)
        optimizer.zero_grad()
        loss = work.loss(model(batch["tokens"]), batch)
        fabric.backward(loss)
        optimizer.step()
        return loss.item()

    serve(step, rank=fabric.global_rank, world=fabric.world_size, checksum=lambda: work.checksum(module))


if __name__ == "__main__":
    main()
