"""Errors inside the user's code become one paragraph: what was called, with which shapes, and the user's own line."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shardwise.errors import JobError, ShardwiseError

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEPTH, ENTRIES = 3, 6  # how much of a nested output is described


@contextmanager
def user_code(what: str, *, folder: str = "", about: Callable[[], str] | None = None) -> Iterator[None]:
    """Run the user's code: whatever it raises becomes a JobError that names `what` and the user's innermost line.

    `folder` is where the user's files are (the job's own folder), else the innermost file outside of installed
    packages is taken. `about()` adds a sentence, such as the shapes. Errors of ours pass through unchanged.
    """
    try:
        yield
    except ShardwiseError:
        raise
    except Exception as error:
        added = f" {about()}" if about is not None else ""
        raise JobError(f"{what} failed{where(error, folder)}: {summary(error)}{added}") from error


def summary(error: BaseException) -> str:
    """`TypeError: the message.`, on one line and cut where a compiler adds its own pages."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else text[:400] + " ..."
    full = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return full if full.endswith((".", "!", "?")) else full + "."


def where(error: BaseException, folder: str = "") -> str:
    """` at FILE:LINE in FUNCTION (`source`)` of the user's innermost frame, or nothing when there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if folder and os.path.abspath(f.filename).startswith(os.path.abspath(folder) + os.sep)]
    outside = [f for f in frames if not _installed(f.filename)]
    for frame in (mine or outside)[-1:]:
        source = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
        quoted = f" (`{source}`)" if source else ""
        return f" at {frame.filename}:{frame.lineno} in {frame.name}{quoted}"
    return ""


def name_of(function: Any) -> str:
    """How the user wrote a function: `contrastive`, `Trainer.loss`, or the type of a callable object."""
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


def shapes(value: Any, depth: int = DEPTH) -> str:
    """`{tokens: int64[8, 256], targets: int64[8, 256]}`: a value's structure with dtypes and shapes."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if depth and isinstance(value, Mapping):
        parts = [f"{key}: {shapes(entry, depth - 1)}" for key, entry in list(value.items())[:ENTRIES]]
        return "{" + ", ".join(parts) + (", ..." if len(value) > ENTRIES else "") + "}"
    if depth and isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        parts = [shapes(entry, depth - 1) for entry in list(value)[:ENTRIES]]
        return "(" + ", ".join(parts) + (", ..." if len(value) > ENTRIES else "") + ")"
    if isinstance(value, (int, float, bool, type(None))):
        return repr(value)
    return type(value).__name__


def _installed(file: str) -> bool:
    path = os.path.abspath(file)
    parts = path.split(os.sep)
    return (
        path.startswith(PACKAGE + os.sep)
        or "site-packages" in parts
        or "dist-packages" in parts
        or file.startswith("<")
        or path == os.path.abspath(os.__file__)
        or path.startswith(os.path.dirname(os.path.abspath(os.__file__)) + os.sep)
    )
