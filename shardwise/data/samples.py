"""What a job's data is: a description that prepares itself once, then samples that every rank can read by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Samples(Protocol):
    """Samples read by index.

    `user_code` says that `batch` runs code of the user, which may draw from the process's random generators: the
    loader then seeds those before each sample, and never calls it from a second thread.
    """

    @property
    def weight_hint(self) -> int:
        """Elements that one sample adds to a loss's weight: the tokens of a text window, else 1."""

    @property
    def user_code(self) -> bool: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Any:
        """These samples, collated. `seeds[k]` alone decides what is random about sample `indices[k]`."""


class Stream(ABC):
    """Samples that can only be read in order, their number unknown before the end.

    The index of a sample is its place in the stream; after the end the stream starts again (the next epoch).
    """

    weight_hint: int
    user_code: bool

    @abstractmethod
    def read(self, positions: Sequence[int], seed: int) -> tuple[Any, list[int]]:
        """The batch at these ascending positions of the run, and the place of each sample in its epoch's stream."""

    @abstractmethod
    def once(self, batch: int, ranks: int, rank: int) -> Iterator[Any]:
        """This rank's batches of one pass, for evaluation."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Samples to train and to evaluate on, and what is known of them (`facts` can be written as JSON)."""

    train: Samples | Stream
    eval: Samples | Stream | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Data(Protocol):
    """A description of a data set; making one reads nothing."""

    def prepare(self, cache: Path, *, seed: int) -> Prepared:
        """Do the heavy work once, keep it in `cache` keyed by content and settings, and open it; later calls only open.

        Processes may call this at the same time. Raises DataError for everything that is wrong with the data.
        """
