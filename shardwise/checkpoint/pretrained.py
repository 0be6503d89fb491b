"""Weights that somebody else has trained, read into a module: of each rank's part only, a few megabytes at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shardwise.checkpoint.tensorfile import DTYPES, dtype_of
from shardwise.errors import CheckpointError
from shardwise.models.partial import parts_in_memory, reserved
from shardwise.spec.layout import Box, whole

_CHUNK_BYTES = 4 << 20
_LONGEST_HEADER = 100 << 20  # the format's own limit
_NAMES = {short: name for name, short in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Names = Mapping[str, str] | Callable[[str], str]


class Source(Protocol):
    """Where the values of a tensor are: `name` and `shape` to say so, and the values themselves in row-major order."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pieces(self) -> Iterator[Tensor]:
        """Flat tensors, one after the other all of its elements; each may be overwritten by the next."""


def pretrained(
    module: nn.Module, path: str | os.PathLike[str], *, names: Names | None = None, new: Sequence[str] = ()
) -> nn.Module:
    """Give a module's parameters the values in `path`; returns the module. Call it where the module is built.

    `path` is a safetensors file, a GGUF file, or a folder with either (with `model.safetensors.index.json` where it
    has several). `names` says what a parameter is called in the file: a mapping or a function of the module's name;
    by default they have the same names, those of a Llama in a GGUF file the ones of `transformers`. Parameters that
    match a glob in `new` keep their first values. Values take the parameter's dtype. Buffers are the module's own.

    On a rank that holds a part of the module only that part is read. Nothing is unpickled. Raises CheckpointError
    for a parameter that the file lacks or has in another shape, and for a file that is not whole.
    """
    sources = _sources(Path(path))
    named = _naming(names, sources)
    wanted = {
        name: parameter
        for name, parameter in module.named_parameters()
        if not any(fnmatchcase(name, pattern) for pattern in new)
    }
    _refuse_unlike(wanted, sources, named, path)
    for name, parameter in wanted.items():
        if parts := parts_in_memory(parameter):
            _copy(sources[named(name)], parameter, parts)
    return module


class _Stored(NamedTuple):
    """A tensor in a safetensors file: `size` bytes from `start`."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[Tensor]:
        """Read, not mapped: what is mapped stays in memory as long as somebody has the file open."""
        buffer = bytearray(min(self.size, _CHUNK_BYTES))
        view = memoryview(buffer)
        left = self.size
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                some = view[: min(left, _CHUNK_BYTES)]
                _fill(file, some, self.path)
                left -= len(some)
                yield torch.frombuffer(some, dtype=self.dtype)


def _fill(file: Any, view: memoryview, path: Path) -> None:
    while view:
        read = file.readinto(view)
        if not read:
            raise CheckpointError(f"{path} ends too early: it became shorter while it was read.")
        view = view[read:]


def _sources(path: Path) -> Mapping[str, Source]:
    try:
        files = _files(path)
        if files[0].suffix == ".gguf":
            from shardwise.checkpoint.gguf import tensors

            return tensors(files[0])
        found: dict[str, Source] = {}
        for file in files:
            found |= _header(file)
        return found
    except OSError as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {error.strerror or error}.") from None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            return _indexed(path, index)
        for kind in ("*.safetensors", "*.gguf"):
            if found := sorted(path.glob(kind)):
                return found
    elif path.suffix in (".safetensors", ".gguf"):
        return [path]
    pickled = path.suffix in _PICKLES or (path.is_dir() and any(p.suffix in _PICKLES for p in path.iterdir()))
    why = " A pickle can run code when it is read, so it is not; convert it to safetensors." if pickled else ""
    raise CheckpointError(f"there are no weights in {path}: no .safetensors and no .gguf file.{why}")


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        found = sorted({path / str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = []
    if not found:
        raise CheckpointError(f"{index} does not say which files have the weights: fetch it again.")
    return found


def _header(path: Path) -> dict[str, Source]:
    """What is in a safetensors file. The format: https://huggingface.co/docs/safetensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if 2 <= length <= min(size - 8, _LONGEST_HEADER) else b""
    try:
        entries = json.loads(raw)
        found = {name: _entry(path, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is no safetensors file, or not a whole one: fetch it again.") from None
    for name, one in found.items():
        if one.start < 8 + length or one.start + one.size > size:
            raise CheckpointError(f"{path} is not whole: '{name}' would end behind its last byte. Fetch it again.")
    return dict(found)


def _entry(path: Path, data: int, entry: Any) -> _Stored:
    dtype, shape = dtype_of(_NAMES[entry["dtype"]]), tuple(int(extent) for extent in entry["shape"])
    start, stop = (int(offset) for offset in entry["data_offsets"])
    if min(shape, default=0) < 0 or stop - start != prod(shape) * dtype.itemsize:
        raise ValueError
    return _Stored(path, data + start, stop - start, dtype, shape)


def _naming(names: Names | None, sources: Mapping[str, Source]) -> Callable[[str], str]:
    if names is None:
        return lambda name: name
    if callable(names):
        return names
    return lambda name: names.get(name, name)


def _refuse_unlike(
    wanted: Mapping[str, Tensor], sources: Mapping[str, Source], named: Callable[[str], str], path: Any
) -> None:
    missing = [name for name in wanted if named(name) not in sources]
    if missing:
        shown = ", ".join(f"'{named(name)}'" for name in missing[:3])
        there = ", ".join(f"'{name}'" for name in islice(sources, 3))
        raise CheckpointError(
            f"the weights in {path} lack {len(missing)} parameters of the module: {shown}{', ...' * (len(missing) > 3)}"
            f" (they have {there}, ...). Say with names= what they are called there, and with new= which the module "
            "shall make itself."
        )
    for name, parameter in wanted.items():
        if sources[named(name)].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"'{named(name)}' in {path} has the shape {list(sources[named(name)].shape)}, and "
                f"{list(parameter.shape)} in the module. Build the module with the sizes of the weights."
            )


@torch.no_grad()
def _copy(source: Source, parameter: Tensor, parts: Sequence[Box]) -> None:
    straight = parameter.is_contiguous() and list(parts) == [whole(tuple(parameter.shape))]
    target = parameter if straight else reserved(torch.empty(parameter.shape, dtype=parameter.dtype))
    flat, done = target.detach().view(-1), 0
    for piece in source.pieces():
        flat[done : done + len(piece)].copy_(piece)
        done += len(piece)
    if target is not parameter:
        for box in parts:
            parameter[box.slices].copy_(target[box.slices])
