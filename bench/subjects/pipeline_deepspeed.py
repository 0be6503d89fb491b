"""DeepSpeed's pipeline engine under its own launcher: the layers as a list, cut evenly by their number."""

from __future__ import annotations

import os
from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench import staged, work
from bench.case import Case
from bench.line import serve


class Placed(nn.Module):
    """A block with the rotary table that it is called with."""

    def __init__(self, block: nn.Module, rope: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("rope", rope)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block(x, self.rope[:, : x.shape[1]])
        return found


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    model = staged.whole(case)
    blocks = [Placed(block, model.rope) for block in model.blocks]
    layers = [model.embed, *blocks, nn.Sequential(model.norm, model.head)]
    module = PipelineModule(layers=layers, num_stages=case.ranks, loss_fn=staged.mean_loss, partition_method="uniform")
    config = {
        "train_batch_size": case.global_batch,
        "train_micro_batch_size_per_gpu": case.global_batch // staged.MICROBATCHES,
        "gradient_accumulation_steps": staged.MICROBATCHES,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=module, optimizer=work.optimizer(case, module.parameters()), config=config
    )
    size = case.global_batch // staged.MICROBATCHES
    batches = _pairs(DataLoader(work.ordered_tokens(case), batch_size=size))

    def step() -> float:
        return float(engine.train_batch(data_iter=batches))

    serve(step, rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))


def _pairs(loader: DataLoader[dict[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in loader:
        yield batch["tokens"], batch["targets"]


if __name__ == "__main__":
    main()
