"""`arrays(...)`: data that is already in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.data.samples import Prepared
from shardwise.errors import DataError


def arrays(train: Any, eval: Any = None) -> Arrays:
    """NumPy arrays or torch tensors with one sample a row: `(inputs, targets)`, or a mapping of names to arrays.

    Batches are mappings of tensors, `{"inputs", "targets"}` for a pair, of the arrays' own dtypes, except that
    integer targets become int64. Raises DataError from `prepare` for lengths that differ, no rows, or other things.
    """
    return Arrays(train, eval)


@dataclass(frozen=True)
class Arrays:
    """Made by `arrays`."""

    train: Any
    eval: Any

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Nothing is written. Facts: samples, eval_samples."""
        train = ArraySamples(_named(self.train, "train"), "train")
        if self.eval is None:
            return Prepared(train=train, facts={"samples": len(train)})
        held = ArraySamples(_named(self.eval, "eval"), "eval")
        return Prepared(train=train, eval=held, facts={"samples": len(train), "eval_samples": len(held)})


class ArraySamples:
    """Rows of arrays of one length."""

    user_code = False
    weight_hint = 1

    def __init__(self, columns: Mapping[str, Any], name: str) -> None:
        self._columns = {key: _checked(key, column, name) for key, column in columns.items()}
        lengths = {key: len(column) for key, column in self._columns.items()}
        if len(set(lengths.values())) != 1:
            listed = ", ".join(f"{key} has {length}" for key, length in lengths.items()) or "there is no array"
            raise DataError(f"The arrays of {name} must have one row for each sample, but {listed}.")
        self._length = next(iter(lengths.values()))
        if not self._length:
            raise DataError(f"The arrays of {name} have no rows: there is no sample in them.")

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """`{name: tensor [B, ...]}`."""
        import torch

        rows = np.asarray(indices, dtype=np.int64)
        found = {}
        for key, column in self._columns.items():
            if isinstance(column, np.ndarray):
                tensor = torch.from_numpy(np.take(column, rows, axis=0))
            else:
                tensor = column.index_select(0, torch.from_numpy(rows))
            if key == "targets" and not tensor.is_floating_point() and not tensor.is_complex():
                tensor = tensor.long()
            found[key] = tensor
        return found


def _named(part: Any, name: str) -> Mapping[str, Any]:
    if isinstance(part, Mapping):
        return part
    if isinstance(part, tuple | list) and len(part) == 2:
        return {"inputs": part[0], "targets": part[1]}
    if isinstance(part, tuple | list):
        raise DataError(f"{name} of the arrays has {len(part)} parts; give (inputs, targets), or a mapping of names.")
    return {"inputs": part}


def _checked(key: str, column: Any, name: str) -> Any:
    """A numeric array or a tensor on the host, with rows."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(column).__mro__}
    if "torch.Tensor" in kinds:
        found = column.detach().cpu()
    else:
        found = np.asarray(column)
        if found.dtype.kind not in "biufc":
            raise DataError(
                f"{key} of {name} has dtype {found.dtype}, which is not numeric. Turn it into numbers first."
            )
        found = found.astype(found.dtype.newbyteorder("="), copy=False)  # torch knows no foreign byte order
    if not found.ndim:
        raise DataError(f"{key} of {name} is a single number; give one row for each sample.")
    return found
