"""The model and the data of every pair: which package of the standard library does a piece of source come from?"""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest")
LENGTH = 128  # bytes of a piece


class Classifier(nn.Module):
    """Bytes [B, 128] -> scores [B, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.words = nn.Conv1d(32, 64, kernel_size=5)
        self.head = nn.Linear(64, len(PACKAGES))

    def forward(self, tokens: Tensor) -> Tensor:
        found = F.relu(self.words(self.embedding(tokens).mT))
        return self.head(found.amax(-1))


class Pieces(Dataset):
    """`count` pieces of each package, `{"tokens": int64 [128], "labels": int64}`; `held_out` ones are others."""

    def __init__(self, count: int, *, held_out: bool = False) -> None:
        self.samples = []
        for label, package in enumerate(PACKAGES):
            folder = Path(sysconfig.get_path("stdlib"), package)
            text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
            for start in range(LENGTH * held_out, len(text) - LENGTH, 2 * LENGTH)[:count]:
                piece = torch.frombuffer(bytearray(text[start : start + LENGTH]), dtype=torch.uint8).long()
                self.samples.append({"tokens": piece, "labels": label})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


def in_order(data: Dataset) -> Subset:
    """An epoch in the order in which Shardwise reads it for seed 0, so that curves compare step by step."""
    from shardwise.data.order import sample_indices

    return Subset(data, sample_indices(range(len(data)), len(data), 0).tolist())
