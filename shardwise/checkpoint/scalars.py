"""Python numbers, strings, lists and dicts <-> JSON, without loss: NaN, infinity, tuples, large and non-string keys."""

from __future__ import annotations

import math
from typing import Any

from shardwise.errors import CheckpointError

_INT64 = 1 << 63


def pack(value: Any, place: str = "scalars") -> Any:
    """`value` in JSON's terms. Raises CheckpointError that names the `place` of anything that is not plain data."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if -_INT64 <= value < _INT64 else {"$int": str(int(value))}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [pack(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [pack(item, f"{place}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, f"{place}.{key}") for key, item in value.items()}
        return {"$dict": [[pack(key, place), pack(item, f"{place}.{key}")] for key, item in value.items()]}
    raise CheckpointError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot hold. Keep numbers, strings, lists, tuples "
        "and dicts there, and pass tensors as tensors."
    )


def unpack(value: Any) -> Any:
    """The inverse of `pack`. Raises ValueError for what `pack` does not make."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key.startswith("$"):
            return _unpack_tagged(key, inner)
    return {key: unpack(item) for key, item in value.items()}


def _unpack_tagged(tag: str, inner: Any) -> Any:
    if tag == "$int" and isinstance(inner, str) and len(inner) < 4000:
        return int(inner)
    if tag == "$float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if tag == "$tuple" and isinstance(inner, list):
        return tuple(unpack(item) for item in inner)
    if tag == "$dict" and isinstance(inner, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in inner):
        keys = [unpack(key) for key, _ in inner]
        if all(isinstance(key, str | int | float | bool | tuple | None) for key in keys):
            return dict(zip(keys, (unpack(item) for _, item in inner), strict=True))
    raise ValueError(f"unknown value {tag}")
