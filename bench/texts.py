"""One case of `loader` as a value: it crosses into every system through the environment. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

TEXTS = "SHARDWISE_BENCH_TEXTS"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The corpus `folder`/corpus.txt, to be read in shuffled batches of `batch` windows of `context` tokens."""

    folder: str
    tokenizer: str = "bytes"
    vocab: int = 4096
    context: int = 256
    batch: int = 32
    seed: int = 1
    workers: int = 0
    batched: bool = False

    @property
    def corpus(self) -> Path:
        return Path(self.folder) / "corpus.txt"

    @property
    def cache(self) -> Path:
        return Path(self.folder) / "cache"

    @property
    def tokens(self) -> Path:
        """Where the prepared tokens are, by the name of their file: `{"path": ..., "tokens": ...}`."""
        return Path(self.folder) / "tokens.json"

    def environment(self) -> dict[str, str]:
        return {TEXTS: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Texts:
        """The case that the harness put into the environment."""
        return cls(**json.loads(os.environ[TEXTS]))
