"""`Store`: where checkpoints lie, as folders of files; `LocalStore` and `MemoryStore` are its leaves."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, deserialize, safe_open

from shardwise.checkpoint.tensorfile import DTYPES, dtype_of
from shardwise.spec.layout import Box, Shape, whole

Chunk = bytes | memoryview
_TORCH_NAMES = {stored: name for name, stored in DTYPES.items()}
_PENDING = "."  # a folder whose name starts so is not a checkpoint: being written, or being removed


class TensorFile(Protocol):
    """An open safetensors file."""

    def shape(self, key: str) -> Shape:
        """Raises KeyError when the file has no such tensor."""
        ...

    def dtype(self, key: str) -> str:
        """torch's name for it. Raises KeyError as well."""
        ...

    def part(self, key: str, box: Box) -> torch.Tensor:
        """The elements in `box` of the stored tensor, on the CPU; may be a view of the file: copy before closing."""
        ...


class Store(Protocol):
    """Everything raises OSError when the medium fails; `tensors` ValueError for a file that is no safetensors."""

    def folders(self) -> list[str]:
        """All folders, those whose names start with a dot (not committed) too."""
        ...

    def create(self, folder: str) -> None:
        """Make the folder, and the place of the store itself if need be."""
        ...

    def write(self, folder: str, name: str, chunks: Iterable[Chunk], *, durable: bool = True) -> None:
        """Write a new file; when it returns and `durable`, the bytes survive a loss of power."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and bytes of the folder's plain files; links and other things are left out."""
        ...

    def read(self, folder: str, name: str) -> bytes: ...

    def digest(self, folder: str, name: str) -> str:
        """The SHA-256 of a file, in hex."""
        ...

    def tensors(self, folder: str, name: str) -> AbstractContextManager[TensorFile]: ...

    def publish(self, folder: str, final: str) -> None:
        """Rename durably, all or nothing."""
        ...

    def discard(self, folder: str, name: str) -> None:
        """Delete one file."""
        ...

    def remove(self, folder: str) -> None:
        """Delete a folder so that a crash in between leaves nothing that looks like a checkpoint."""
        ...

    def where(self, folder: str) -> str:
        """How to name the folder in messages."""
        ...


def pending(name: str) -> str:
    """The name under which the checkpoint folder `name` is written before it is published."""
    return f"{_PENDING}writing-{name}"


def is_pending(folder: str) -> bool:
    """Whether a folder is a half-written or half-removed checkpoint."""
    return folder.startswith(_PENDING)


class LocalStore:
    """Checkpoints as folders of a directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def create(self, folder: str) -> None:
        (self.path / _plain(folder)).mkdir(parents=True)

    def write(self, folder: str, name: str, chunks: Iterable[Chunk], *, durable: bool = True) -> None:
        path = self._file(folder, name)
        try:
            with open(path, "xb") as out:
                for chunk in chunks:
                    out.write(chunk)
                out.flush()
                if durable:
                    os.fsync(out.fileno())
        except FileExistsError:
            raise
        except OSError:
            path.unlink(missing_ok=True)  # makes room for the record that says why
            raise

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        with os.scandir(self.path / _plain(folder)) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    found[entry.name] = status.st_size
        return found

    def read(self, folder: str, name: str) -> bytes:
        return self._file(folder, name).read_bytes()

    def digest(self, folder: str, name: str) -> str:
        with open(self._file(folder, name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def tensors(self, folder: str, name: str) -> Iterator[TensorFile]:
        try:
            file = safe_open(str(self._file(folder, name)), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file ({error})") from None
        with file as opened:
            yield _LocalTensors(opened)

    def publish(self, folder: str, final: str) -> None:
        _sync_folder(self.path / _plain(folder))
        os.rename(self.path / _plain(folder), self.path / _plain(final))
        _sync_folder(self.path)

    def discard(self, folder: str, name: str) -> None:
        self._file(folder, name).unlink()

    def remove(self, folder: str) -> None:
        place = self.path / _plain(folder)
        if not is_pending(folder):
            doomed = self.path / f"{_PENDING}removing-{folder}"
            os.rename(place, doomed)
            place = doomed
        shutil.rmtree(place)

    def where(self, folder: str) -> str:
        return str(self.path / folder)

    def _file(self, folder: str, name: str) -> Path:
        return self.path / _plain(folder) / _plain(name)


class MemoryStore:
    """Checkpoints in this process's memory: for tests, with `capacity_bytes` as the size of its medium."""

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.content: dict[str, dict[str, bytes]] = {}
        self._lock = threading.Lock()

    def folders(self) -> list[str]:
        return sorted(self.content)

    def create(self, folder: str) -> None:
        with self._lock:
            if folder in self.content:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), folder)
            self.content[_plain(folder)] = {}

    def write(self, folder: str, name: str, chunks: Iterable[Chunk], *, durable: bool = True) -> None:
        raw = b"".join(chunks)
        with self._lock:
            used = sum(len(file) for files in self.content.values() for file in files.values())
            if self.capacity_bytes is not None and used + len(raw) > self.capacity_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}/{name}")
            self._files(folder)[_plain(name)] = raw

    def sizes(self, folder: str) -> dict[str, int]:
        return {name: len(raw) for name, raw in self._files(folder).items()}

    def read(self, folder: str, name: str) -> bytes:
        try:
            return self._files(folder)[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{folder}/{name}") from None

    def digest(self, folder: str, name: str) -> str:
        return hashlib.sha256(self.read(folder, name)).hexdigest()

    @contextmanager
    def tensors(self, folder: str, name: str) -> Iterator[TensorFile]:
        try:
            found = dict(deserialize(self.read(folder, name)))
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file ({error})") from None
        yield _MemoryTensors(found)

    def publish(self, folder: str, final: str) -> None:
        with self._lock:
            if final in self.content:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final)
            self.content[_plain(final)] = self.content.pop(folder)

    def discard(self, folder: str, name: str) -> None:
        with self._lock:
            self._files(folder).pop(name)

    def remove(self, folder: str) -> None:
        with self._lock:
            self.content.pop(folder)

    def where(self, folder: str) -> str:
        return f"memory:{folder}"

    def _files(self, folder: str) -> dict[str, bytes]:
        try:
            return self.content[folder]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder) from None


class _LocalTensors:
    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self._keys = frozenset(opened.keys())

    def shape(self, key: str) -> Shape:
        if key not in self._keys:
            raise KeyError(key)
        return tuple(self._opened.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        if key not in self._keys:
            raise KeyError(key)
        return _TORCH_NAMES.get(self._opened.get_slice(key).get_dtype(), "unknown")

    def part(self, key: str, box: Box) -> torch.Tensor:
        stored = self._opened.get_slice(key)
        if box == whole(tuple(stored.get_shape())):
            return self._opened.get_tensor(key)
        return stored[box.slices]


class _MemoryTensors:
    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def shape(self, key: str) -> Shape:
        return tuple(self._found[key]["shape"])

    def dtype(self, key: str) -> str:
        return _TORCH_NAMES.get(self._found[key]["dtype"], "unknown")

    def part(self, key: str, box: Box) -> torch.Tensor:
        flat = torch.frombuffer(self._found[key]["data"], dtype=dtype_of(self.dtype(key)))
        return flat.reshape(self.shape(key))[box.slices]


def _plain(name: str) -> str:
    """Refuse a name that leads out of its folder."""
    if not name or name in (".", "..") or "/" in name or os.sep in name or "\0" in name:
        raise PermissionError(errno.EPERM, "not a plain file name", name)
    return name


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
