"""torch's DataLoader over a map-style data set on the memory-mapped tokens, with its sampler or with whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from bench.packed import Batch, serve_batches, windows
from bench.texts import Texts


class Windows(Dataset[Any]):
    """A window by its index, or a batch of them by a list of indices."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | list[int]) -> Batch:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"tokens": row[..., :-1], "targets": row[..., 1:]}


def main() -> None:
    texts = Texts.from_environment()
    data = Windows(windows(texts))
    more: dict[str, Any] = {"num_workers": texts.workers, "persistent_workers": texts.workers > 0}
    if texts.batched:  # "disable automatic batching": the data set is asked for whole batches
        sampler = BatchSampler(RandomSampler(data), texts.batch, drop_last=True)
        loader = DataLoader(data, sampler=sampler, batch_size=None, **more)
    else:
        loader = DataLoader(data, batch_size=texts.batch, shuffle=True, drop_last=True, **more)

    def epoch() -> Iterator[Batch]:
        yield from loader

    serve_batches(epoch)


if __name__ == "__main__":
    main()
