"""Small models, batches and losses for the tests of `parallel`, and one process that computes what ranks should."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shardwise.data.order import rank_slice, shard_slices, shards_of, stream_seed
from shardwise.parallel.step import StepResult

FEATURES, OUTPUTS = 6, 3


class Micro(NamedTuple):
    """What a loader hands to `step`."""

    batch: Any
    stream: int
    shard: int | None = None


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, OUTPUTS))


def data(step: int, samples: int) -> dict[str, Tensor]:
    """The global batch of a step; each sample has a weight, 0 for some of them but not the first."""
    g = torch.Generator().manual_seed(100 + step)
    counts = torch.randint(0, 3, (samples,), generator=g).float()
    counts[0] = 2.0
    return {
        "input": torch.randn(samples, FEATURES, generator=g),
        "targets": torch.randn(samples, OUTPUTS, generator=g),
        "counts": counts,
    }


def rows(batch: dict[str, Tensor], which: Sequence[int] | range) -> dict[str, Tensor]:
    return {key: value[list(which)] for key, value in batch.items()}


def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted squared error: uneven weights in every part of the batch."""
    each = (output - batch["targets"]).square().sum(-1)
    return (each * batch["counts"]).sum(), batch["counts"].sum()


def share(step: int, samples: int, rank: int, ranks: int, pieces: int = 1) -> list[Micro]:
    """A rank's microbatches of a step; none when it has no sample."""
    mine = list(rank_slice(samples, ranks, rank))
    size = -(-len(mine) // pieces) if mine else 1
    cut = [mine[i : i + size] for i in range(0, len(mine), size)]
    whole = data(step, samples)
    return [Micro(rows(whole, piece), stream_seed(0, step, rank, i)) for i, piece in enumerate(cut)]


def exact_share(step: int, samples: int, rank: int, ranks: int, shards: int) -> list[Micro]:
    slices = shard_slices(samples, shards)
    whole = data(step, samples)
    mine = [s for s in shards_of(rank, ranks, shards) if len(slices[s])]
    return [Micro(rows(whole, slices[s]), stream_seed(0, step, s, 0), s) for s in mine]


def one_process(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: int,
    steps: int,
    *,
    clip_norm: float | None = None,
    loss: Callable[[Any, Any], tuple[Tensor, Tensor]] = loss,
    wide: bool = True,
) -> list[float]:
    """The plain loop on the whole batch: mean losses."""
    losses = []
    for step in range(steps):
        batch = data(step, samples)
        batch = {k: v.double() for k, v in batch.items()} if wide else batch
        total, weight = loss(module(batch["input"]), batch)
        optimizer.zero_grad()
        (total / weight).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        optimizer.step()
        losses.append((total / weight).item())
    return losses


def fingerprint(module: nn.Module) -> str:
    """Of the bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def values(module: nn.Module) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in module.parameters()]


def times_are_sane(result: StepResult) -> bool:
    return min(result.compute_s, result.comm_s, result.optimizer_s) >= 0
