"""A data description over a file that is tokenised already."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shardwise.data.pack import Windows
from shardwise.data.source import Prepared


class TokenFile:
    """Windows of `context` tokens over a file of uint16 tokens."""

    def __init__(self, path: Path, context: int) -> None:
        self.path = path
        self.context = context

    def prepare(self, cache: Path, *, seed: int) -> Prepared:
        """Nothing to prepare: open the file."""
        count = self.path.stat().st_size // np.dtype(np.uint16).itemsize
        return Prepared(train=Windows(self.path, np.uint16, tokens=count, context=self.context))
