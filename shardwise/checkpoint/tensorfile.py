"""Write a safetensors file as a stream of chunks, hashed on the way: no copy of the tensors is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from shardwise.errors import CheckpointError
from shardwise.spec.layout import Shape

DTYPES = {  # torch's name -> the format's name
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
_CHUNK_BYTES = 1 << 20  # small enough that a chunk is still in the core's cache when it is written after hashing


class Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> None: ...


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """`float32` and the like. Raises CheckpointError, naming the tensor, for what the format cannot hold."""
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in DTYPES or tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        raise CheckpointError(
            f"the tensor '{name}' cannot be saved: it is a {tensor.layout} tensor of {tensor.dtype} on device "
            f"'{tensor.device}'. Checkpoints hold dense tensors with data, of {', '.join(DTYPES)}. "
            "Convert it to one of these."
        )
    return found


def dtype_size(name: str) -> int:
    """Bytes of one element of the dtype of that name."""
    return dtype_of(name).itemsize


def dtype_of(name: str) -> torch.dtype:
    """`float32` -> `torch.float32`."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), name
    return found


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a DTensor; any other tensor itself."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second, and without it there is none
    if module is not None and isinstance(tensor, module.DTensor):
        return tensor.to_local()
    return tensor


def stream(
    tensors: Mapping[str, torch.Tensor], digest: Hash, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of `tensors`, at most 1 MiB at a time; `digest` has seen them all at the end.

    Tensors may lie on any device and be strided in any way; one at a time is copied to the CPU or made contiguous,
    only if it is not. The format: https://huggingface.co/docs/safetensors (length of the header as 8 bytes, little
    endian; the header in JSON; the data without gaps).
    """
    ordered = _ordered(tensors)
    head = _header(ordered, metadata or {})
    digest.update(head)
    yield head
    for key in ordered:
        raw = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), _CHUNK_BYTES):
            chunk = raw[start : start + _CHUNK_BYTES]
            digest.update(chunk)
            yield chunk


def _ordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Wide elements first, so that each tensor starts at a multiple of its element's size and can be mapped."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _header(ordered: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for key, tensor in ordered.items():
        stop = start + tensor.nbytes
        shape: Shape = tuple(tensor.shape)
        entries[key] = {"dtype": DTYPES[dtype_name(tensor, key)], "shape": shape, "data_offsets": (start, stop)}
        start = stop
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
