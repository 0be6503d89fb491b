"""The work that all systems share, in torch: model, data, optimizer and loss of a case."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.case import Case
from shardwise.models.gpt import GPT
from shardwise.models.losses import next_token_loss

# What DDP's documentation recommends where it applies: gradients that are views of the buckets, and no broadcast of
# buffers that never change. Every peer that is built on DDP gets it.
DDP_OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False}


class Tokens(Dataset[dict[str, Tensor]]):
    """Packed samples of a token file [samples, context + 1], memory-mapped: `tokens` and `targets`, int64 [context]."""

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"tokens": row[:-1], "targets": row[1:]}


def ordered_tokens(case: Case) -> Tokens:
    """The samples in the order of the steps: step s of all ranks together is rows s x global batch and following."""
    return Tokens(Path(case.folder) / "ordered.npy")


def model(case: Case) -> nn.Module:
    """The case's GPT; the seed makes it the same in every system."""
    torch.manual_seed(case.seed)
    return GPT(layers=case.layers, width=case.width, heads=case.heads, vocab=case.vocab, context=case.context)


def optimizer(case: Case, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in its fused form, the fastest on CPU and GPU."""
    return torch.optim.AdamW(parameters, lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean next-token loss of a batch."""
    total, weight = next_token_loss(logits, batch)
    return total / weight


def autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast for a bfloat16 case, nothing for float32."""
    if case.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(case.device, dtype=torch.bfloat16)


def checksum(module: nn.Module) -> float:
    """The sum of all parameters, in float64."""
    with torch.no_grad():
        return float(sum(parameter.double().sum().item() for parameter in module.parameters()))


def on_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The batch on a device; on CPU the batch itself."""
    return {name: value.to(device) for name, value in batch.items()}
