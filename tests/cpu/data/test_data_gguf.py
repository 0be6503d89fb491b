"""GGUF files: settings, places, a Llama's configuration, and its tokenizer; files that are not what they seem."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from shardwise.data.gguf import Gguf, llama_config, read_gguf, tokenizer, write_folder
from shardwise.errors import DataError

WORDS = [chr(letter) for letter in range(97, 123)] + ["<|end|>", "\u0120", "th", "the", "1", "2"]
MERGES = ["t h", "th e"]


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def setting(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def written(path: Path, **changed: Any) -> Path:
    """By hand, as the format says."""
    kinds = [3 if word.startswith("<|") else 1 for word in WORDS]
    settings = [
        setting("general.architecture", 8, text(changed.get("kind", "llama"))),
        setting("general.alignment", 4, struct.pack("<I", 64)),
        setting("llama.block_count", 4, struct.pack("<I", 3)),
        setting("llama.embedding_length", 10, struct.pack("<Q", 8)),
        setting("llama.rope.freq_base", 6, struct.pack("<f", 5e4)),
        setting("tokenizer.ggml.model", 8, text("gpt2")),
        setting("tokenizer.ggml.pre", 8, text(changed.get("pre", "smollm"))),
        setting("tokenizer.ggml.tokens", 9, strings(WORDS)),
        setting("tokenizer.ggml.token_type", 9, struct.pack(f"<IQ{len(WORDS)}i", 5, len(WORDS), *kinds)),
        setting("tokenizer.ggml.merges", 9, strings(MERGES)),
        setting("tokenizer.ggml.add_bos_token", 7, b"\0"),
    ]
    tensors = [
        text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, len(WORDS), 0, 0),
        text("output_norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 8 * len(WORDS) * 4),
    ]
    head = b"GGUF" + struct.pack("<IQQ", changed.get("version", 3), len(tensors), len(settings))
    raw = head + b"".join(settings) + b"".join(tensors)
    path.write_bytes(raw + bytes(-len(raw) % 64) + bytes(8 * (len(WORDS) + 1) * 4))
    return path


def test_settings_and_places(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    found = read_gguf(path)
    assert found.settings["llama.block_count"] == 3
    assert found.settings["tokenizer.ggml.add_bos_token"] is False
    assert found.settings["tokenizer.ggml.tokens"] == WORDS
    first, second = found.tensors["token_embd.weight"], found.tensors["output_norm.weight"]
    assert (first.shape, second.shape, first.kind) == ((len(WORDS), 8), (8,), 0)
    assert first.start % 64 == 0
    assert second.start + second.size * 4 == path.stat().st_size


def test_a_folder_for_transformers(tmp_path: Path) -> None:
    write_folder(written(tmp_path / "a.gguf"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (3, 8, len(WORDS))
    assert (config["rope_theta"], config["tie_word_embeddings"]) == (5e4, True)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.encode("the the12<|end|>").tokens == ["the", "\u0120", "the", "1", "2", "<|end|>"]
    assert made.decode(made.encode("the end").ids) == "the end"


def test_other_models_and_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of the kind 'gemma3'"):
        llama_config(read_gguf(written(tmp_path / "a.gguf", kind="gemma3")))
    with pytest.raises(DataError, match="of the kind 'qwen2'"):
        tokenizer(read_gguf(written(tmp_path / "a.gguf", pre="qwen2")))
    with pytest.raises(DataError, match="'None'"):
        tokenizer(Gguf({}, {}))


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    raw = path.read_bytes()
    end = raw.index(b"output_norm.weight") + 30
    for keep in (0, 3, 4, 8, 20, 30, 60, 200, 500, end):
        path.write_bytes(raw[:keep])
        with pytest.raises(DataError, match="no GGUF file|cut off or altered"):
            read_gguf(path)
    path.write_bytes(raw.replace(struct.pack("<Q", len(b"llama.block_count")), struct.pack("<Q", 1 << 62), 1))
    with pytest.raises(DataError, match="cut off or altered"):
        read_gguf(path)
    with pytest.raises(DataError, match="version 2 or 3"):
        read_gguf(written(tmp_path / "a.gguf", version=9))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "nowhere.gguf")
