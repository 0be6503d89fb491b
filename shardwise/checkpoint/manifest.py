"""`manifest.json`: which box of which global tensor lies in which file, parsed strictly and trusted in nothing."""

from __future__ import annotations

import hashlib
import re
from math import prod
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field, structs

from shardwise.checkpoint.scalars import unpack
from shardwise.checkpoint.store import Store
from shardwise.checkpoint.tensorfile import DTYPES, dtype_size
from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.spec.layout import Box, Shape, covers, whole
from shardwise.spec.plan import Plan

MANIFEST = "manifest.json"
VERSION = 1
_LARGEST_BYTES = 1 << 28
_FOLDER = re.compile(r"step-(\d{8,18})(?:-(\d{1,9}))?")
_FILE = re.compile(r"rank-\d{1,9}\.safetensors")

Extent = Annotated[int, Meta(ge=0, lt=1 << 62)]


class DamagedCheckpoint(CheckpointError):
    """A file of the checkpoint is missing, cut short, altered, or not what it should be: an older one may be whole."""


class Piece(Struct, frozen=True, forbid_unknown_fields=True):
    """One box of a tensor, and the file that has it under `key_of(...)`."""

    file: str
    offset: tuple[Extent, ...]
    shape: tuple[Extent, ...]

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One global tensor; its pieces are disjoint and cover it."""

    dtype: str
    shape: tuple[Extent, ...]
    pieces: tuple[Piece, ...]


class FileFacts(Struct, frozen=True, forbid_unknown_fields=True):
    """What a whole file looks like."""

    bytes: Extent
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class RankRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank wrote, or why it did not: `rank-N.json`, there only until the manifest is made of them."""

    tensors: dict[str, Entry] = {}
    file: FileFacts | None = None
    failure: str = ""


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A checkpoint: the state after `step` finished steps, saved under `plan`. `scalars` are still packed.

    `best`: the best evaluation so far when it was saved. `folder` is where it was read from; it is never stored.
    """

    version: int
    step: Extent
    plan: Plan
    tensors: dict[str, Entry]
    files: dict[str, FileFacts]
    scalars: dict[str, Any] = field(default_factory=dict)
    best: bool = False
    folder: str = ""

    @property
    def bytes(self) -> int:
        """The size of its tensor files."""
        return sum(facts.bytes for facts in self.files.values())


class _Sealed(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    manifest: msgspec.Raw


class _Version(Struct, frozen=True):
    version: int


def folder_name(step: int, taken: list[str]) -> str:
    """`step-00000400`, then `step-00000400-1` and so on when a run that went back saves that step again."""
    attempts = [attempt for found, attempt in map(_parse_folder, taken) if found == step]
    return f"step-{step:08d}" + (f"-{max(attempts) + 1}" if attempts else "")


def committed(store: Store) -> list[str]:
    """The folders of finished checkpoints, newest first. Raises CheckpointError when the place cannot be listed."""
    try:
        found = store.folders()
    except OSError as error:
        raise CheckpointError(
            f"cannot list the checkpoints in {store.where('')}: {error.strerror}. Make that folder readable, or choose "
            "another place for the run."
        ) from None
    return sorted((name for name in found if _FOLDER.fullmatch(name)), key=_parse_folder, reverse=True)


def step_of(folder: str) -> int:
    """The step in a folder's name; -1 for another name."""
    return _parse_folder(folder)[0]


def file_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def record_name(rank: int) -> str:
    return f"rank-{rank}.json"


def key_of(name: str, shape: Shape, box: Box) -> str:
    """What the box is called in its file: the tensor's name, with the index behind it when it is not the whole."""
    if box == whole(shape):
        return name
    return name + "[" + ",".join(f"{o}:{o + s}" for o, s in zip(box.offset, box.shape, strict=True)) + "]"


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: the manifest, and the SHA-256 of just those bytes of it."""
    raw = msgspec.json.encode(manifest)
    return msgspec.json.encode(_Sealed(hashlib.sha256(raw).hexdigest(), msgspec.Raw(raw)))


def read(store: Store, folder: str) -> Manifest:
    """The manifest of a checkpoint, checked against itself. Raises DamagedCheckpoint; does not look at the files."""
    where = store.where(folder)
    try:
        num_bytes = store.sizes(folder).get(MANIFEST)
        if num_bytes is None:
            raise DamagedCheckpoint(f"{where} has no {MANIFEST}: it is not a whole checkpoint.")
        if num_bytes > _LARGEST_BYTES:
            raise DamagedCheckpoint(f"{where}/{MANIFEST} has {num_bytes} bytes, more than any real one.")
        manifest = _decode(store.read(folder, MANIFEST), where)
        _check(manifest)
        if not isinstance(unpack(manifest.scalars), dict):
            raise ValueError("its scalars are no dict")
    except OSError as error:
        raise DamagedCheckpoint(f"{where} cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where}/{MANIFEST} is damaged: {error}.") from None
    return structs.replace(manifest, folder=folder)


def sizes_agree(store: Store, manifest: Manifest) -> bool:
    """The quick look: every file is there and as long as it should be."""
    try:
        sizes = store.sizes(manifest.folder)
    except OSError:
        return False
    return all(sizes.get(name) == facts.bytes for name, facts in manifest.files.items())


def _decode(raw: bytes, where: str) -> Manifest:
    sealed = msgspec.json.decode(raw, type=_Sealed)
    if hashlib.sha256(sealed.manifest).hexdigest() != sealed.sha256:
        raise ValueError("its checksum does not match, so it was altered or cut short")
    version = msgspec.json.decode(sealed.manifest, type=_Version).version
    if version != VERSION:
        raise CheckpointError(
            f"{where} has format version {version}; this Shardwise reads version {VERSION}. "
            "Install the Shardwise that wrote it, or a newer one."
        )
    try:
        return msgspec.json.decode(sealed.manifest, type=Manifest)
    except ShardwiseError as error:
        raise ValueError(str(error)) from None


def _check(manifest: Manifest) -> None:
    """Raises ValueError unless names stay inside the folder, boxes cover the tensors and fit into the files."""
    for name in manifest.files:
        if not _FILE.fullmatch(name):
            raise ValueError(f"'{name}' is not the name of a tensor file")
    used = dict.fromkeys(manifest.files, 0)
    for name, entry in manifest.tensors.items():
        if entry.dtype not in DTYPES:
            raise ValueError(f"'{name}' has the unknown dtype '{entry.dtype}'")
        if not covers([piece.box for piece in entry.pieces], entry.shape):
            raise ValueError(f"the pieces of '{name}' do not cover it exactly once")
        for piece in entry.pieces:
            if piece.file not in used:
                raise ValueError(f"'{name}' lies in '{piece.file}', which is not a file of this checkpoint")
            used[piece.file] += prod(piece.shape) * dtype_size(entry.dtype)
    for name, num_bytes in used.items():
        if num_bytes > manifest.files[name].bytes:
            raise ValueError(f"'{name}' is said to hold more than its {manifest.files[name].bytes} bytes")


def _parse_folder(name: str) -> tuple[int, int]:
    match = _FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)
