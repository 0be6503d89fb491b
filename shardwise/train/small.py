"""A job made small without its help: fewer of its repeated blocks, and shorter texts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shardwise.models.inputs import call
from shardwise.spec.job import TrainJob

BLOCKS = 4  # as many stages as a plan is verified with
LENGTH = 128  # positions of a text


def shallow(job: TrainJob, example: Any) -> TrainJob:
    """The job with the first BLOCKS of each list of alike blocks in its model, where that still runs on `example`."""

    def build() -> nn.Module:
        module = job.model()
        if depth(module) <= BLOCKS:
            return module
        less = copy.deepcopy(module)  # it may be the user's own
        _drop_blocks(less)
        return less if _runs(less, job, example) else module

    return structs.replace(job, model=build)


def depth(module: nn.Module) -> int:
    """The number of blocks in the longest list of alike blocks; 0 without one."""
    return max((len(blocks) for blocks in _lists(module)), default=0)


def shorter(batch: Any) -> Any:
    """The batch with texts of LENGTH positions: where all its tables are whole numbers for as many positions."""
    tables = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 1]
    texts = all(table.dim() == 2 and not table.is_floating_point() for table in tables)
    if not tables or not texts or len({table.shape[1] for table in tables}) != 1 or tables[0].shape[1] <= LENGTH:
        return batch
    return tree_map(lambda leaf: leaf[:, :LENGTH] if isinstance(leaf, Tensor) and leaf.dim() > 1 else leaf, batch)


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    every = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [blocks for blocks in every if len({_kind(block) for block in blocks}) == 1 and len(blocks) > 1]


def _kind(block: nn.Module) -> tuple[Any, ...]:
    return type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def _drop_blocks(module: nn.Module) -> None:
    for blocks in _lists(module):
        del blocks[BLOCKS:]


def _runs(module: nn.Module, job: TrainJob, example: Any) -> bool:
    """A model that counts its blocks elsewhere does not run with fewer."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            call(module, example, job.forward)
        except Exception:  # whatever the user's code raises, it is then verified as it is
            return False
    return True
