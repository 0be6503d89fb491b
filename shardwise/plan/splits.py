"""What a tensor axis splits and what stays whole, in words."""

from __future__ import annotations

from collections.abc import Mapping

_LEAVE = {"column": "by columns", "row": "by rows", "vocabulary": "along the vocabulary", "whole": "whole"}


def splits_text(splits: Mapping[str, str], whole: Mapping[str, str]) -> list[str]:
    """A line for each kind of split, then one for each reason to stay whole, with the patterns of the parameters.

    `splits` says how the parameters of a pattern are split, `whole` why others are not. What neither names is small
    (norms, the biases of rows) and whole. A layer whose parameters go alike is said once.
    """
    kinds: dict[str, list[str]] = {}
    for pattern, how in splits.items():
        kinds.setdefault(_LEAVE.get(how, how), []).append(pattern)
    for pattern, why in whole.items():
        kinds.setdefault(f"whole ({why})", []).append(pattern)
    return [f"{how}: {', '.join(dict.fromkeys(_layer(one) for one in names))}" for how, names in kinds.items()]


def _layer(pattern: str) -> str:
    head, _, last = pattern.rpartition(".")
    return head if head and last in ("weight", "bias") else pattern
