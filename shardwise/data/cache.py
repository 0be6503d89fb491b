"""Folders of prepared data on disk: named by what they hold, made once, never seen half-written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardwise.errors import DataError

_SIZES = "sizes.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK_LIMIT_S = 3600.0


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/shardwise`, or `~/.cache/shardwise`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "shardwise"


def key_of(*settings: Any) -> str:
    """A short name for settings that can be written as JSON; equal settings give equal names on every machine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def folder(root: Path, kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """`root/kind/key`, made by `make(empty folder)` unless it is there and whole.

    Several processes may ask at once: one makes, the others wait for it. The folder appears under its name by one
    rename after everything in it was flushed. Raises DataError when the cache cannot be written or the disk is full.
    """
    final = root / kind / key
    if is_whole(final):
        return final
    with explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.parent / f".{key}.lock"):
            if not is_whole(final):
                _make(final, make)
    return final


def is_whole(made: Path) -> bool:
    """Whether a folder holds every file that it was made with, each of its full size."""
    try:
        sizes = json.loads((made / _SIZES).read_bytes())
        return all(os.path.getsize(made / name) == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn an OSError of writing below `place` into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"The disk that holds the data cache is full: writing {error.filename or place} failed "
                f"({error.strerror}). Nothing half-written was kept. Free some space, or set XDG_CACHE_HOME to a "
                "folder on a larger disk."
            ) from error
        raise DataError(
            f"The data cache cannot be used: {error.filename or place}: {error.strerror or error}. "
            "Give this user the right to write there, or set XDG_CACHE_HOME to a folder that can be written."
        ) from error


def _make(final: Path, make: Callable[[Path], None]) -> None:
    _sweep(final)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-{socket.gethostname()}-{os.getpid()}-", dir=final.parent))
    try:
        make(temporary)
        _seal(temporary)
        if final.exists():  # damaged: is_whole() was false under the lock
            shutil.rmtree(final)
        try:
            os.rename(temporary, final)
        except OSError:
            if not is_whole(final):  # else a process that could not lock was quicker: the same content
                raise
        _flush(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(made: Path) -> None:
    files = sorted(path for path in made.rglob("*") if path.is_file())
    for path in files:
        _flush(path)
    sizes = {str(path.relative_to(made)): path.stat().st_size for path in files}
    (made / _SIZES).write_text(json.dumps(sizes))
    _flush(made / _SIZES)
    _flush(made)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(final: Path) -> None:
    """Remove what killed processes of this machine left half-made."""
    start = f".{final.name}-{socket.gethostname()}-"
    for left in final.parent.glob(f"{start}*"):
        pid = left.name[len(start) :].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _locked(path: Path, limit_s: float = _LOCK_LIMIT_S) -> Iterator[None]:
    """Hold an advisory lock; go on without it where the file system has none or its holder takes too long.

    That is safe, since the rename decides; it only means that the work is done twice.
    """
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(fd)
