"""A data description over a file that is tokenised already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.data.pack import Windows
from shardwise.data.source import Prepared


class TokenFile:
    """Windows of `context` tokens over a file of uint16 tokens; `held_out`: an array of whole windows, to evaluate."""

    def __init__(self, path: Path, context: int, held_out: Path | None = None) -> None:
        self.path = path
        self.context = context
        self.held_out = held_out

    def prepare(self, cache: Path, *, seed: int) -> Prepared:
        """Nothing to prepare: open the file."""
        count = self.path.stat().st_size // np.dtype(np.uint16).itemsize
        train = Windows(self.path, np.uint16, tokens=count, context=self.context)
        return Prepared(train=train, eval=Rows(self.held_out) if self.held_out else None)


class Rows:
    """The rows of an array, uint16 [samples, context + 1], as samples."""

    user_code = False

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path)
        self.weight_hint = self.rows.shape[1] - 1

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """`{"tokens": int64 [B, T], "targets": int64 [B, T]}`: each target is the token that follows."""
        import torch

        read = torch.from_numpy(self.rows[list(indices)].astype(np.int64))
        return {"tokens": read[:, :-1], "targets": read[:, 1:]}
