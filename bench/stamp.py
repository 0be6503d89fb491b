"""A moment that another process can read: each rank writes the monotonic clock to a file of its own. No torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAMP = "SHARDWISE_BENCH_STAMP"


def stamp(rank: int) -> None:
    """Write now to `$SHARDWISE_BENCH_STAMP-<rank>`, whole or not at all."""
    path = Path(f"{os.environ[STAMP]}-{rank}")
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(str(time.clock_gettime(time.CLOCK_MONOTONIC)))
    temporary.replace(path)


def read(prefix: str | Path, ranks: int) -> float | None:
    """The latest of the ranks' stamps, or None while one is missing."""
    try:
        return max(float(Path(f"{prefix}-{rank}").read_text()) for rank in range(ranks))
    except FileNotFoundError:
        return None
