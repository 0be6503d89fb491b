"""The model of `tensor` in one process, whose operations use all cores."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from bench import decoder, work
from bench.case import Case
from bench.line import serve


def main() -> None:
    case = Case.from_environment()
    model = decoder.model(case)
    torch.set_num_threads(2)
    optimizer = work.optimizer(case, model.parameters())
    batches = iter(DataLoader(work.ordered_tokens(case), batch_size=case.global_batch))

    def step() -> float:
        batch = next(batches)
        optimizer.zero_grad()
        loss = work.loss(model(batch["tokens"]), batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(step, rank=0, world=1)


if __name__ == "__main__":
    main()
