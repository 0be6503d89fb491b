"""What keeps less in memory, on ranks that each have a part of the parameters: like one process in the same formats."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from msgspec import structs
from test_low_bit import batch, gpt

from shardwise.models.losses import next_token_loss
from shardwise.parallel.low_bit import BLOCK
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.parallel.tensor.find import find_splits
from shardwise.parallel.updates import PiecewiseUpdates
from shardwise.spec.plan import Offload, Plan, Recompute
from tests.ranks import Rank, run_ranks

STEPS = 8
DISK = Offload(optimizer="disk")
LOW: dict[str, Any] = {"precision": "bfloat16", "parameters": "bfloat16"}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "disk": {"offload": DISK},
    "bfloat16": {"states": "bfloat16"},
    "int8": {"states": "int8"},
    "int8 on disk": {"states": "int8", "offload": DISK},
    "autocast": {"precision": "bfloat16"},
    "masters": LOW,
    "masters on disk": {**LOW, "offload": DISK},
    "no masters": {**LOW, "master": "none"},
    "no masters, int8": {**LOW, "master": "none", "states": "int8"},
}
AXES: dict[str, dict[str, int]] = {
    "tensor": {"tensor": 2},
    "zero 1": {"shard": 2, "zero": 1},
    "zero 2": {"shard": 2, "zero": 2},
    "zero 3": {"shard": 2, "zero": 3},
    "zero 1, tensor": {"shard": 2, "zero": 1, "tensor": 2},
    "zero 3, tensor": {"shard": 2, "zero": 3, "tensor": 2},
    "pipeline, tensor": {"pipeline": 2, "tensor": 2},
}


@functools.cache
def splits() -> Any:
    return find_splits(gpt(), batch(0)[0].batch, 2).splits


def plan_of(axes: dict[str, int], **fields: Any) -> Plan:
    return Plan(**axes, splits=splits() if "tensor" in axes else {}, **fields)


def trained(rank: Rank, plan: Plan) -> Any:
    """Losses and norms of a few steps, the parameters in the end, and the bytes that this rank holds between steps."""
    module = gpt()
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    curve = []
    for number in range(STEPS):
        found = step(replica, [optimizer], share(plan, rank.rank, number), loss=next_token_loss, clip_norm=1.0)
        curve.append((found.loss, found.grad_norm))
    held = sum(p.untyped_storage().nbytes() for p in module.parameters())
    replica.gather()
    replica.close()
    return curve, {name: p.detach() for name, p in module.named_parameters()}, held


def share(plan: Plan, rank: int, number: int) -> Any:
    (whole,) = batch(number)
    if plan.shard == 1:
        return [whole]
    place, each = plan.coordinates(rank)["shard"], 8 // plan.shard
    cut = {key: value[each * place : each * place + each] for key, value in whole.batch.items()}
    return [whole._replace(batch=cut)]
