"""A GGUF file: what it says of a model, where its tensors are, its tokenizer and its configuration.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian).
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shardwise.errors import DataError

_PLAIN = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?")  # by the number of the type
_LONG = {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SPECIAL = 3  # the type of a token that text is never cut into
_LLAMA = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


class Tensor(NamedTuple):
    """`shape` as torch counts it, the number of its format (0: float32, 1: float16, else blocks), where it starts."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


class Gguf(NamedTuple):
    """The settings of a file by their names, and its tensors by theirs."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> Gguf:
    """The file without the numbers of its tensors. Raises DataError for another format and a file that is cut off."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
                raise DataError(f"{path} is no GGUF file of version 2 or 3.")
            tensors, settings = _number(file, "<Q"), _number(file, "<Q")
            found = {_string(file): _value(file, _number(file, "<I")) for _ in range(settings)}
            places = {_string(file): _place(file) for _ in range(tensors)}
            step = int(found.get("general.alignment", 32))
            data = -(-file.tell() // step) * step
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (struct.error, ValueError, TypeError, IndexError, ArithmeticError, MemoryError, RecursionError):
        raise DataError(f"{path} is cut off or altered: fetch it again.") from None
    return Gguf(found, {name: Tensor(shape, kind, data + start) for name, (shape, kind, start) in places.items()})


def llama_config(found: Gguf) -> dict[str, Any]:
    """The `config.json` of `transformers` for a file that holds a Llama. Raises DataError for another model."""
    said = found.settings
    kind = said.get("general.architecture")
    if kind != "llama":
        raise DataError(f"the GGUF file holds a model of the kind '{kind}'; only those of a Llama can be read.")
    config = {name: said[f"llama.{key}"] for key, name in _LLAMA.items() if f"llama.{key}" in said}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        "vocab_size": found.tensors["token_embd.weight"].shape[0],
        "rope_theta": said.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in found.tensors,
        "bos_token_id": said.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": said.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": said.get("tokenizer.ggml.padding_token_id"),
    }


def tokenizer(found: Gguf) -> Any:
    """The byte-level BPE of the file, for the library `tokenizers`. Raises DataError for another kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    said = found.settings
    if said.get("tokenizer.ggml.model") != "gpt2" or said.get("tokenizer.ggml.pre") != "smollm":
        raise DataError(
            f"the GGUF file's tokenizer is a '{said.get('tokenizer.ggml.model')}' of the kind "
            f"'{said.get('tokenizer.ggml.pre')}'; only SmolLM's byte-level BPE can be made of one."
        )
    words, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(each.split(" ")) for each in said["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _SPECIAL]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return made


def write_folder(weights: Path, made: Path) -> None:
    """Put `config.json` and `tokenizer.json` of a GGUF file into a folder."""
    found = read_gguf(weights)
    (made / "config.json").write_text(json.dumps(llama_config(found), indent=1))
    tokenizer(found).save(str(made / "tokenizer.json"))


def _number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    raw = file.read(length)
    if len(raw) != length:
        raise ValueError
    return raw.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        return [_value(file, inner) for _ in range(count)]
    return _number(file, _PLAIN[kind] if kind < len(_PLAIN) else _LONG.get(kind, "!"))


def _place(file: BinaryIO) -> tuple[tuple[int, ...], int, int]:
    dims = _number(file, "<I")
    if dims > 8:
        raise ValueError
    shape = tuple(reversed([_number(file, "<Q") for _ in range(dims)]))
    return shape, _number(file, "<I"), _number(file, "<Q")
