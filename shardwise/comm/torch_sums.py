"""`fold`: sums and other reductions of raw memory in a fixed order, by torch; the compiled kernel's bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements at a time: what is added up stays in a core's cache
HALVES = (torch.bfloat16, torch.float16)


def fold(
    targets: Sequence[int], sources: Sequence[int], nbytes: int, dtype: torch.dtype, reduction: str, scratch: Tensor
) -> None:
    """Fill every target with the reduction of the sources, from the first to the last; all are addresses of `nbytes`.

    Halves are summed in float32 and rounded once. A target may be a source. `scratch` has 8 * BLOCK bytes of uint8.
    """
    for at in range(0, nbytes, BLOCK * dtype.itemsize):
        count = min(BLOCK, (nbytes - at) // dtype.itemsize)
        rows = [view(each + at, count, dtype) for each in sources]
        into = [view(each + at, count, dtype) for each in targets]
        in_place = dtype not in HALVES and not {*targets} & {*sources[2:]}
        total = into[0] if in_place else scratch[: BLOCK * max(4, dtype.itemsize)].view(_exact(dtype))[:count]
        _sum(rows, total, reduction, scratch[4 * BLOCK :].view(torch.float32)[:count])
        for each in into:
            if each is not total:
                each.copy_(total)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def view(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """Memory as a tensor, whoever owns it."""
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def _sum(rows: Sequence[Tensor], total: Tensor, reduction: str, wide: Tensor) -> None:
    half = rows[0].dtype in HALVES
    total_is_first = half or len(rows) == 1
    if total_is_first:
        total.copy_(rows[0])
    pair = _PAIRS[reduction] if rows[0].dtype != torch.bool else _TRUTHS[reduction]
    so_far = total if total_is_first else rows[0]
    for row in rows[1:]:
        pair(so_far, wide.copy_(row) if half else row, total)
        so_far = total
    if reduction == "AVG" and total.dtype != torch.bool:
        torch.div(total, len(rows), rounding_mode=None if total.is_floating_point() else "trunc", out=total)


def _least(a: Tensor, b: Tensor, out: Tensor) -> Any:
    """Of two equal numbers (0.0 and -0.0) the first; a number that is none wins."""
    return torch.where((b < a) | (b != b), b, a, out=out)


def _most(a: Tensor, b: Tensor, out: Tensor) -> Any:
    return torch.where((b > a) | (b != b), b, a, out=out)


_PAIRS: dict[str, Any] = {
    "SUM": lambda a, b, out: torch.add(a, b, out=out),
    "AVG": lambda a, b, out: torch.add(a, b, out=out),
    "PRODUCT": lambda a, b, out: torch.mul(a, b, out=out),
    "MIN": _least,
    "MAX": _most,
    "BAND": lambda a, b, out: torch.bitwise_and(a, b, out=out),
    "BOR": lambda a, b, out: torch.bitwise_or(a, b, out=out),
    "BXOR": lambda a, b, out: torch.bitwise_xor(a, b, out=out),
}
_ALL, _ANY = _PAIRS["BAND"], _PAIRS["BOR"]
_TRUTHS = {**_PAIRS, "SUM": _ANY, "MAX": _ANY, "AVG": _ALL, "PRODUCT": _ALL, "MIN": _ALL}
