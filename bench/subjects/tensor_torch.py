"""torch's tensor parallelism by hand under torchrun: `parallelize_module` over gloo, as its tutorial lays it out.

Column-wise and row-wise linear layers, the embedding by rows, the output layer by columns. With `loss_parallel` the
scores stay cut over the vocabulary; without it they are gathered.
"""

from __future__ import annotations

import contextlib
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils.data import DataLoader

from bench import decoder, work
from bench.case import Case
from bench.line import serve


def split(model: decoder.Decoder, *, by_vocabulary: bool) -> None:
    """Make the linear layers and the embedding DTensors over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    output = ColwiseParallel(
        output_layouts=Shard(-1) if by_vocabulary else Replicate(), use_local_output=not by_vocabulary
    )
    parallelize_module(model, mesh, {"tok_embeddings": RowwiseParallel(input_layouts=Replicate()), "output": output})
    for layer in model.layers:
        plan = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
        plan |= {"attention.wo": RowwiseParallel(), "feed_forward.w2": RowwiseParallel()}
        plan |= {"feed_forward.w1": ColwiseParallel(), "feed_forward.w3": ColwiseParallel()}
        parallelize_module(layer, mesh, plan)


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    by_vocabulary = "loss_parallel" in sys.argv
    model = decoder.model(case)
    split(model, by_vocabulary=by_vocabulary)
    # Tensors of both kinds do not go through one fused or foreach call.
    cut = [p for p in model.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
    rest = [p for p in model.parameters() if not isinstance(p, torch.distributed.tensor.DTensor)]
    optimizers = [work.optimizer(case, cut), work.optimizer(case, rest)]
    batches = iter(DataLoader(work.ordered_tokens(case), batch_size=case.global_batch))

    def step() -> float:
        batch = next(batches)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with loss_parallel() if by_vocabulary else contextlib.nullcontext():
            scores = model(batch["tokens"])
            loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["targets"].flatten())
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        value = loss.full_tensor() if isinstance(loss, torch.distributed.tensor.DTensor) else loss
        return value.item()

    serve(step, rank=rank, world=world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
