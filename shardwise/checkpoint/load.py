"""Load: find the newest whole checkpoint, check what this rank needs of it, copy its boxes into the given tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import torch
from msgspec import structs

from shardwise import events
from shardwise.checkpoint.manifest import DamagedCheckpoint, Entry, Manifest, committed, key_of, read, sizes_agree
from shardwise.checkpoint.relayout import Move, moves
from shardwise.checkpoint.scalars import unpack
from shardwise.checkpoint.store import Store, TensorFile
from shardwise.checkpoint.tensorfile import dtype_name, dtype_of, local_part
from shardwise.errors import CheckpointError
from shardwise.spec.layout import boxes, holds, local_shape
from shardwise.spec.plan import Plan


class _Copy(NamedTuple):
    name: str
    key: str
    stored_shape: tuple[int, ...]
    move: Move


def latest(store: Store) -> Manifest | None:
    """The newest checkpoint whose manifest is whole and whose files have the right sizes; None when there is none.

    It reads no tensor file: `newest_whole` and `load` check the contents too.
    """
    return next((manifest for manifest in _readable(store) if sizes_agree(store, manifest)), None)


def best(store: Store) -> Manifest | None:
    """The newest checkpoint that was saved as the best; None when there is none. As `latest`, it reads no tensors."""
    return next((found for found in _readable(store) if found.best and sizes_agree(store, found)), None)


def newest_whole(store: Store) -> Manifest | None:
    """The newest checkpoint all of whose files have their checksums; None when the store has no checkpoint.

    Emits `checkpoint_damaged` for each newer one passed over. Raises CheckpointError when there are some and none is
    whole.
    """
    found = committed(store)
    for folder in found:
        try:
            manifest = read(store, folder)
            verify(store, manifest)
            return manifest
        except DamagedCheckpoint as error:
            report_damage(store, folder, str(error))
    if found:
        raise none_whole(store, found)
    return None


def verify(store: Store, manifest: Manifest, files: Iterable[str] | None = None) -> None:
    """Check size and SHA-256 of the `files` (all by default), on all cores. Raises DamagedCheckpoint."""
    names = sorted(manifest.files if files is None else files)
    where = store.where(manifest.folder)
    try:
        sizes = store.sizes(manifest.folder)
        for name in names:
            facts = manifest.files[name]
            if name not in sizes:
                raise DamagedCheckpoint(f"{where}/{name} is missing.")
            if sizes[name] != facts.bytes:
                raise DamagedCheckpoint(f"{where}/{name} has {sizes[name]} bytes instead of {facts.bytes}.")
        with ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1))) as pool:
            digests = list(pool.map(lambda name: store.digest(manifest.folder, name), names))
    except OSError as error:
        raise DamagedCheckpoint(f"{where} cannot be read: {error.strerror or error}.") from None
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest.files[name].sha256:
            raise DamagedCheckpoint(f"{where}/{name} was altered: its SHA-256 is not the one in the manifest.")


def load(store: Store, manifest: Manifest, wanted: Mapping[str, torch.Tensor], plan: Plan, rank: int) -> dict[str, Any]:
    """Copy the checkpoint into the tensors `wanted`, the local ones of `rank` under `plan`; returns the scalars.

    `plan` may differ from the one that it was saved under. Only the files that hold something of this rank are
    checked and read, and of those only its boxes are copied. Raises CheckpointError when the checkpoint is of another
    model (names, shapes or dtypes differ; nothing was copied) and DamagedCheckpoint when a file is not what the
    manifest says (checked before anything is copied).
    """
    compare(store, manifest, wanted, plan, rank)
    verify(store, manifest, needed_files(manifest, wanted, plan, rank))
    fill(store, manifest, wanted, plan, rank)
    return scalars_of(manifest)


def fill(store: Store, manifest: Manifest, wanted: Mapping[str, torch.Tensor], plan: Plan, rank: int) -> None:
    """`load` without its checks, for a caller that has made them with `compare` and `verify`."""
    with torch.no_grad():
        for file, group in _copies(manifest, wanted, plan, rank).items():
            _copy(store, manifest, file, group, wanted)


def read_tensors(store: Store, manifest: Manifest, kinds: Iterable[str]) -> dict[str, torch.Tensor]:
    """All whole tensors whose names begin with one of `kinds` (such as `model/`), checked, on the CPU."""
    starts = tuple(kinds)
    wanted = {
        name: torch.empty(entry.shape, dtype=dtype_of(entry.dtype))
        for name, entry in manifest.tensors.items()
        if name.startswith(starts)
    }
    load(store, manifest, wanted, Plan(), 0)
    return wanted


def scalars_of(manifest: Manifest) -> dict[str, Any]:
    """The plain data that was saved with it."""
    found = unpack(manifest.scalars)
    assert isinstance(found, dict)
    return found


def needed_files(manifest: Manifest, wanted: Mapping[str, torch.Tensor], plan: Plan, rank: int) -> list[str]:
    """The tensor files that hold something of what `rank` wants."""
    return list(_copies(manifest, wanted, plan, rank))


def compare(store: Store, manifest: Manifest, wanted: Mapping[str, torch.Tensor], plan: Plan, rank: int) -> None:
    """Raises CheckpointError, naming the first differences, unless the checkpoint has what is wanted and no more.

    More is allowed of a kind (`model`, `optimizer`, ...) of which nothing is wanted, and of other pipeline stages.
    """
    kinds = {_kind(name) for name in wanted}
    missing = [name for name in wanted if name not in manifest.tensors]
    unexpected = [
        name for name in manifest.tensors if name not in wanted and _kind(name) in kinds and holds(name, plan, rank)
    ]
    wrong = [
        text
        for name, tensor in wanted.items()
        if name in manifest.tensors and (text := _difference(name, tensor, manifest.tensors[name], plan, rank))
    ]
    if missing or unexpected or wrong:
        found = [
            f"{len(names)} {what} ({', '.join(islice(names, 3))}{', ...' if len(names) > 3 else ''})"
            for names, what in (
                (missing, "missing in the checkpoint"),
                (unexpected, "not in the model"),
                (wrong, "of another shape or dtype"),
            )
            if names
        ]
        raise CheckpointError(
            f"the checkpoint {store.where(manifest.folder)} is of another model: of its tensors {'; '.join(found)}. "
            "Use it with the job that wrote it."
        )


def report_damage(store: Store, folder: str, why: str) -> None:
    """Tell that a checkpoint was passed over."""
    events.emit("checkpoint_damaged", path=store.where(folder), why=why)


def none_whole(store: Store, folders: Sequence[str]) -> CheckpointError:
    """The error for a store in which every checkpoint is damaged."""
    return CheckpointError(
        f"none of the {len(folders)} checkpoints in {store.where('')} is whole, so there is nothing to go on from. "
        "The events say what is wrong with each. Restore one from a copy, or start a new run."
    )


def _readable(store: Store) -> Iterator[Manifest]:
    for folder in committed(store):
        with suppress(DamagedCheckpoint):
            yield read(store, folder)


def _kind(name: str) -> str:
    """Parameters and buffers together are the model."""
    head, slash, _ = name.partition("/")
    return "model" if head == "buffer" or not slash else head


def _difference(name: str, tensor: torch.Tensor, entry: Entry, plan: Plan, rank: int) -> str:
    found, dtype = tuple(local_part(tensor).shape), dtype_name(tensor, name)
    if not holds(
        name, plan, rank
    ):  # what another stage has: the shape of its split and the format that it was built in
        plan = structs.replace(plan, zero=1, parameters="float32", master="float32")
        dtype = entry.dtype
    expected = local_shape(name, entry.shape, plan, rank)
    if (found, dtype) == (expected, entry.dtype):
        return ""
    return f"{name}: {entry.dtype}{list(expected)} in the checkpoint, {dtype}{list(found)} in the model"


def _copies(manifest: Manifest, wanted: Mapping[str, torch.Tensor], plan: Plan, rank: int) -> dict[str, list[_Copy]]:
    """What is to be copied, by file."""
    found: dict[str, list[_Copy]] = {}
    for name in wanted:
        entry = manifest.tensors[name]
        for move in moves([piece.box for piece in entry.pieces], boxes(name, entry.shape, plan, rank)):
            piece = entry.pieces[move.source]
            copy = _Copy(name, key_of(name, entry.shape, piece.box), piece.shape, move)
            found.setdefault(piece.file, []).append(copy)
    return found


def _copy(store: Store, manifest: Manifest, file: str, group: list[_Copy], wanted: Mapping[str, torch.Tensor]) -> None:
    where = f"{store.where(manifest.folder)}/{file}"
    try:
        with store.tensors(manifest.folder, file) as opened:
            _check_stored(opened, manifest, group, where)
            for name, key, _, move in group:
                local_part(wanted[name])[move.put.slices].copy_(opened.part(key, move.take))
    except OSError as error:
        raise DamagedCheckpoint(f"{where} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{where} is {error}.") from None


def _check_stored(opened: TensorFile, manifest: Manifest, group: list[_Copy], where: str) -> None:
    for name, key, shape, _ in group:
        try:
            stored = (opened.dtype(key), opened.shape(key))
        except KeyError:
            raise DamagedCheckpoint(f"{where} has no tensor '{key}', which the manifest places there.") from None
        if stored != (manifest.tensors[name].dtype, shape):
            raise DamagedCheckpoint(
                f"{where} has '{key}' as {stored[0]}{list(stored[1])}, the manifest says otherwise."
            )
