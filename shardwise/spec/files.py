"""Strict loading and saving of the nouns as TOML or JSON: an unknown key is an error with a suggestion."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shardwise.errors import SpecError, did_you_mean

T = TypeVar("T")


def convert(value: Any, kind: type[T], *, source: str, strict: bool = True) -> T:
    """Built-in dicts and lists -> `kind`. Raises SpecError that names the field, the value's place and `source`."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise SpecError(_explain(str(error), kind, source)) from None


def load(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Read a `.toml` or `.json` file as `kind`. Raises SpecError on a missing file, bad syntax or an unknown key."""
    file = Path(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {file}: {error.strerror}. Give the path of a .toml or .json file.") from None
    try:
        value = msgspec.toml.decode(raw) if file.suffix == ".toml" else msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise SpecError(f"{file} is not valid {file.suffix[1:].upper() or 'JSON'}: {error}.") from None
    return convert(value, kind, source=str(file))


def save(value: Any, path: str | os.PathLike[str]) -> None:
    """Write `value` as `.json`, whole or not at all: a temporary file in the same folder, fsynced, then renamed."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2) + b"\n")


def write_whole(path: str | os.PathLike[str], raw: bytes) -> None:
    """Write `raw` so that a reader sees the old file or the new one, never a half of either."""
    file = Path(path)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(raw)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _explain(message: str, kind: type, source: str) -> str:
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if unknown:
        word, place = unknown[1], unknown[2] or ""
        section = f" in [{place}]" if place else ""
        return f"unknown key '{word}'{section} of {source}{did_you_mean(word, _fields(kind, place))}"
    return f"{source}: {message}. Correct that field and try again."


def _fields(kind: Any, place: str) -> list[str]:
    """Field names of the Struct that `place` (such as `sync` or `nodes[...].devices[...]`) leads to."""
    info: Any = msgspec.inspect.type_info(kind)
    for part in [p for p in re.sub(r"\[[^\]]*\]", "", place).split(".") if p]:
        field = next((f for f in getattr(info, "fields", ()) if f.encode_name == part), None)
        info = _struct_in(field.type) if field else None
    return [f.encode_name for f in getattr(info, "fields", ())]


def _struct_in(info: Any) -> Any:
    if hasattr(info, "fields"):
        return info
    inner = [getattr(info, name) for name in ("item_type", "value_type") if getattr(info, name, None) is not None]
    inner += list(getattr(info, "types", ()))
    return next((found for found in map(_struct_in, inner) if found is not None), None)
