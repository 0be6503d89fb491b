"""Calling the user's data set, transform and collate: seeded by sample, failures named by sample."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shardwise.data.seeding import seed_generators
from shardwise.errors import DataError

Collate = Callable[[list[Any]], Any]


def one_by_one(get: Callable[[int], Any], indices: Sequence[int], seeds: Sequence[int], what: str) -> list[Any]:
    """`get(index)` of each, the random generators seeded by the sample's own seed before it. Raises DataError."""
    items = []
    for index, seed in zip(indices, seeds, strict=True):
        seed_generators(seed)
        with named(f"{what} {index}"):
            items.append(get(index))
    return items


def collated(collate: Collate | None, items: list[Any], indices: Sequence[int], seed: int) -> Any:
    """The items as one batch. Raises DataError.

    What is random in `collate` follows the first sample's seed, and so depends on which samples share its batch.
    """
    seed_generators(seed)
    with named(f"collate{'' if collate else ' (torch default_collate)'} of samples {shown(indices)}"):
        return (collate or default_collate)(items)


def default_collate(items: list[Any]) -> Any:
    """torch's default_collate, but a batch of tuples is a tuple again."""
    from torch.utils.data import default_collate as plain

    made = plain(items)
    return tuple(made) if isinstance(items[0], tuple) and isinstance(made, list) else made


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turn any exception of the user's code into a DataError that says which sample and which line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = str(error).strip() or "no message"
        raise DataError(
            f"{what[0].upper()}{what[1:]} failed: {type(error).__name__}: {text} ({_line(error)}). "
            "Correct the data set, its transform or its collate function, or leave that sample out."
        ) from error


def shown(indices: Sequence[int]) -> str:
    """The first few indices, for a message."""
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")


def _line(error: BaseException) -> str:
    """The innermost line that is not in an installed package, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}site-packages{os.sep}" not in frame.filename]
    frame = (own[1:] or frames)[-1]  # own[0] is this file
    return f"{frame.filename}, line {frame.lineno}"
