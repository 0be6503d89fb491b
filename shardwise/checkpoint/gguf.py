"""A GGUF file's tensors under the names of `transformers`, dequantised a few rows at a time.

Of a Llama's queries and keys each head's rows are stored in pairs (llama.cpp turns neighbours, `transformers` turns
the halves of a head), so they are put back into their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardwise.data.gguf import Gguf, read_gguf
from shardwise.errors import CheckpointError, DataError, MissingPackage

_CHUNK_ELEMENTS = 1 << 20
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Quantised(NamedTuple):
    """One tensor in the file; a row of its last dim takes `row_bytes`. `heads` where its rows are stored in pairs."""

    path: Path
    start: int
    row_bytes: int
    kind: int
    shape: tuple[int, ...]
    heads: int

    def pieces(self) -> Iterator[Tensor]:
        """Flat float32 tensors of whole rows; of paired rows whole heads."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        *outer, width = self.shape
        count = int(np.prod(outer))
        unit = count // self.heads if self.heads else 1
        step = unit * max(1, _CHUNK_ELEMENTS // (unit * width))
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for start in range(0, count, step):
                rows = min(step, count - start)
                raw = file.read(rows * self.row_bytes)
                if len(raw) != rows * self.row_bytes:
                    raise CheckpointError(f"{self.path} ends too early. Fetch it again.")
                packed = np.frombuffer(raw, dtype=np.uint8).reshape(rows, self.row_bytes)
                found = dequantize(packed, GGMLQuantizationType(self.kind))
                if self.heads:
                    found = found.reshape(-1, unit // 2, 2, width).swapaxes(1, 2)
                yield torch.from_numpy(np.array(found, dtype=np.float32).reshape(-1))


def tensors(path: Path) -> dict[str, Quantised]:
    """What is in the file. Raises CheckpointError for another architecture than a Llama's, and a file not whole."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingPackage(f"reading {path.name} needs the package 'gguf'. Run: pip install gguf") from None
    try:
        held = read_gguf(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    kind = held.settings.get("general.architecture")
    if kind != "llama":
        raise CheckpointError(
            f"{path} holds a model of the kind '{kind}'; of GGUF files only those of a Llama can be read. Use its "
            "safetensors."
        )
    pairs = _heads(path, held)
    size, found = path.stat().st_size, {}
    for stored, one in held.tensors.items():
        name, part = _name(stored)
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(one.kind)]
        except (ValueError, KeyError):
            raise CheckpointError(f"'{stored}' in {path} is in a format that is not known here: {one.kind}.") from None
        if not one.size or len(one.shape) != 2 and part in pairs:
            raise CheckpointError(f"'{stored}' in {path} has the shape {list(one.shape)}, which no Llama has.")
        row_bytes = one.shape[-1] // block * block_bytes
        if one.shape[-1] % block or one.start + one.size // one.shape[-1] * row_bytes > size:
            raise CheckpointError(f"{path} is not whole: '{stored}' would end behind its last byte. Fetch it again.")
        found[name] = Quantised(
            path, one.start, row_bytes, one.kind, one.shape, pairs.get(part, 0) if len(one.shape) > 1 else 0
        )
    return found


def _heads(path: Path, held: Gguf) -> dict[str, int]:
    """How many heads have their rows in pairs, by the part of a block."""
    try:
        heads = int(held.settings["llama.attention.head_count"])
        found = {"attn_q": heads, "attn_k": int(held.settings.get("llama.attention.head_count_kv", heads))}
    except (KeyError, TypeError, ValueError):
        found = {}
    if not found or min(found.values()) < 1:
        raise CheckpointError(f"{path} does not say how many heads its model has. Fetch it again.")
    return found


def _name(name: str) -> tuple[str, str]:
    """The name in `transformers`, and the part of a block that it is."""
    inside = _BLOCK.fullmatch(name)
    if inside is None or inside[2] not in _INSIDE:
        return _OUTSIDE.get(name, name), ""
    return f"model.layers.{inside[1]}.{_INSIDE[inside[2]]}.{inside[3]}", inside[2]
