"""Ray Train's TorchTrainer with one worker a rank: `prepare_model`, `prepare_data_loader`, torch's own autocast."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_data_loader, prepare_model
from torch.utils.data import DataLoader

from bench.case import Case
from bench.line import ADDRESS, connect, serve


def loop(config: dict[str, Any]) -> None:
    """What each worker runs."""
    import torch

    from bench import work

    case = Case(**config["case"])
    torch.set_num_threads(1)
    module = work.model(case)
    model = prepare_model(module, parallel_strategy_kwargs=dict(work.DDP_OPTIONS))
    optimizer = work.optimizer(case, model.parameters())
    loader = prepare_data_loader(DataLoader(work.ordered_tokens(case), batch_size=case.batch))
    batches = iter(loader)

    def step() -> float:
        batch = next(batches)
        optimizer.zero_grad()
        with work.autocast(case):
            loss = work.loss(model(batch["tokens"]), batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    context = ray.train.get_context()
    serve(
        step,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        checksum=lambda: work.checksum(module),
        line=connect(config["address"]),
    )


def main() -> None:
    case = Case.from_environment()
    on_gpu = case.device == "cuda"
    # The trainer's own actors need places beside the workers; logical CPUs take no core.
    ray.init(num_cpus=case.ranks + 2, include_dashboard=False, log_to_driver=True)
    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            loop,
            train_loop_config={"case": vars(case), "address": os.environ[ADDRESS]},
            scaling_config=ScalingConfig(num_workers=case.ranks, use_gpu=on_gpu),
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            run_config=RunConfig(name="bench", storage_path=storage),
        )
        trainer.fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
