"""A file of tokens as fixed-length windows: window i predicts tokens i*T+1 .. i*T+T, so no target is seen twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwise.data.rows import RowFile


class Windows:
    """Samples of `context` + 1 tokens, stepping by `context`, over a file of uint16 or uint32 tokens."""

    user_code = False

    def __init__(self, path: Path, dtype: npt.DTypeLike, *, tokens: int, context: int) -> None:
        self._rows = RowFile(path, dtype, length=context + 1, stride=context, count=max(0, tokens - 1) // context)
        self.weight_hint = context

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """`{"tokens": int64 [B, T], "targets": int64 [B, T]}`: each target is the token that follows."""
        import torch

        read = self._rows.read(indices)
        return {
            "tokens": torch.from_numpy(read[:, :-1].astype(np.int64)),
            "targets": torch.from_numpy(read[:, 1:].astype(np.int64)),
        }
