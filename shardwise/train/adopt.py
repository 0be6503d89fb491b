"""`run.prepare`: an existing script's model and loader, made to work on every rank without changing its loop."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from shardwise.comm.mesh import Mesh
from shardwise.data.order import rank_slice
from shardwise.errors import JobError, SpecError
from shardwise.parallel.parallelize import parallelize
from shardwise.plan.formats import updates_in_pieces
from shardwise.plan.synchronisations import refuse_together
from shardwise.train.context import agree


class Adopted:
    """A module whose gradients are averaged over ranks by the time `backward` returns.

    Each rank's loss is a mean over its own samples; where ranks have unequal numbers of them, the gradient of the
    module's output is weighted by `share`: this rank's samples over the global batch's, times the number of ranks.
    Weighted there, what batch norms exchange in backward has the right weights too.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        plan = mesh.plan
        if plan.exact or plan.microbatches > 1 or plan.pipeline > 1 or plan.tensor > 1 or plan.precision != "float32":
            raise SpecError(
                "run.prepare leaves the loop to the script, so it cannot obey exact, microbatches, pipeline, tensor or "
                f"precision of the plan {plan}. Start the script with --plan data={plan.data}, or use "
                "sw.session(model=...) for them."
            )
        refuse_together(plan, "own_loop", "run.prepare")
        if updates_in_pieces(plan) or plan.offload.activations != "none":
            raise SpecError(
                f"run.prepare leaves backward and the optimizer to the script, so it cannot obey states, parameters or "
                f"offload of the plan {plan}. Leave them out, or use sw.session(model=...)."
            )
        self.mesh = mesh
        self.share = 1.0
        self.replica = parallelize(module, mesh.plan, mesh)
        self._queued = False
        self._handles: list[Any] = []
        if mesh.world > 1:
            self._handles.append(module.register_forward_hook(self._weigh))
            trainable = [p for p in module.parameters() if p.requires_grad]
            self._handles += [p.register_post_accumulate_grad_hook(self._arrived) for p in trainable]

    def loader(self, loader: DataLoader[Any]) -> Any:
        """The loader, cut so that each of its batches is shared out over the ranks."""
        return loader if self.mesh.world == 1 else CutLoader(loader, self)

    def close(self) -> None:
        """Give the module back as it was."""
        for handle in self._handles:
            handle.remove()
        self.replica.close()

    def _weigh(self, module: nn.Module, args: Any, output: Any) -> None:
        share = self.share
        if share == 1.0 or not torch.is_grad_enabled():
            return
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: grad * share)

    def _arrived(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            # runs when this backward pass is over; distributed data parallel in torch finishes the same way
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _finish(self) -> None:
        self._queued = False
        self.replica.synchronise()


class CutLoader:
    """A DataLoader over this rank's part of each global batch; `len` is that of the original."""

    def __init__(self, loader: DataLoader[Any], adopted: Adopted) -> None:
        if loader.batch_sampler is None:
            raise JobError(
                "the DataLoader given to run.prepare has no batch sampler (iterable data or batch_size=None), so "
                "its batches cannot be shared out. Use sw.session(model=..., data=...), which takes iterable data sets."
            )
        if isinstance(loader.sampler, DistributedSampler):
            raise JobError(
                "the DataLoader given to run.prepare has a DistributedSampler; run.prepare shares out the batches. "
                "Remove the sampler and make batch_size the global batch."
            )
        self.adopted = adopted
        self.original = loader
        self.sizes: deque[float] = deque()
        self.dataset = loader.dataset
        self._inner: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=_Cut(loader, self),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
            generator=loader.generator,
        )

    def __len__(self) -> int:
        return len(self.original)

    def __iter__(self) -> Iterator[Any]:
        self.sizes.clear()
        for batch in self._inner:
            self.adopted.share = self.sizes.popleft()
            yield batch


class _Cut(torch.utils.data.Sampler[list[int]]):
    """This rank's indices of every global batch. A rank without a sample gets one that weighs nothing."""

    def __init__(self, loader: DataLoader[Any], cut: CutLoader) -> None:
        self.loader = loader
        self.cut = cut

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[int]]:
        mesh = self.cut.adopted.mesh
        assert self.loader.batch_sampler is not None
        for batch in _same_order(self.loader, mesh):
            mine = rank_slice(len(batch), mesh.world, mesh.rank)
            self.cut.sizes.append(len(mine) * mesh.world / len(batch))
            yield [batch[i] for i in mine] or [batch[0]]


def _same_order(loader: DataLoader[Any], mesh: Mesh) -> Iterator[list[int]]:
    """The loader's own batches, in rank 0's order on every rank, and in the order of one process with its seed."""
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        drawn = int(torch.empty((), dtype=torch.int64).random_().item())
        sampler.generator = torch.Generator().manual_seed(int(agree(mesh, str(drawn))))
        try:
            yield from batches
        finally:
            sampler.generator = None
    elif isinstance(sampler, RandomSampler | SequentialSampler) and type(batches) is BatchSampler:
        yield from batches
    else:  # any other sampler may draw from the rank's own generator: rank 0 says what it drew
        for batch in batches:
            yield json.loads(agree(mesh, json.dumps([int(index) for index in batch])))
