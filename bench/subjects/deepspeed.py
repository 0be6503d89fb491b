"""DeepSpeed under its own launcher: `deepspeed.initialize` with ZeRO stage 0, and torch autocast for bfloat16."""

from __future__ import annotations

import os

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler

from bench import work
from bench.case import Case
from bench.line import serve


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="nccl" if case.device == "cuda" else "gloo")
    module = work.model(case)
    config = {
        "train_micro_batch_size_per_gpu": case.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # it would clip to a norm of 1 by default
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": case.precision != "float32", "dtype": "bfloat16"},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=module, optimizer=work.optimizer(case, module.parameters()), config=config
    )
    tokens = work.ordered_tokens(case)
    loader = DataLoader(tokens, batch_size=case.batch, sampler=DistributedSampler(tokens, shuffle=False))
    batches = iter(loader)

    def step() -> float:
        batch = work.on_device(next(batches), engine.device)
        loss = work.loss(engine(batch["tokens"]), batch)
        engine.backward(loss)
        engine.step()
        return loss.item()

    serve(
        step,
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        checksum=lambda: work.checksum(module),
    )


if __name__ == "__main__":
    main()
