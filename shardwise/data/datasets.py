"""`dataset(...)`: any map-style or iterable data set of the user, torch's or Hugging Face's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.data.samples import Prepared, Samples, Stream
from shardwise.data.stream import IterableSamples
from shardwise.data.user_code import Collate, collated, named, one_by_one
from shardwise.errors import DataError


def dataset(train: Any, eval: Any = None, collate: Collate | None = None) -> Datasets:
    """A data set with `__getitem__` and `__len__`, or an iterable one, or a Hugging Face `datasets.Dataset`.

    `collate(list of samples) -> batch`; without it torch's default_collate stacks tensors, numbers and arrays through
    tuples and mappings. Before each sample `random`, numpy's legacy generator and torch's are seeded by the sample's
    position in the run, so that augmentation does not depend on ranks or workers (a `numpy.random.Generator` of the
    data set's own would). A Hugging Face data set without a format gives torch tensors.

    An iterable data set is read by every rank, which keeps its own share: reading costs each rank the whole stream.
    It must give the same samples in the same order each epoch; `set_epoch(epoch)` is called if it is there. After a
    resume the samples seen are read again and thrown away (whole epochs are jumped over once the length is known).
    """
    return Datasets(train, eval, collate)


@dataclass(frozen=True)
class Datasets:
    """Made by `dataset`."""

    train: Any
    eval: Any
    collate: Collate | None

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Nothing is written. Facts: samples and eval_samples where the data sets know their length."""
        train = _samples(self.train, self.collate, "train")
        held = None if self.eval is None else _samples(self.eval, self.collate, "eval")
        facts = {
            name: len(found)
            for name, found in (("samples", train), ("eval_samples", held))
            if found is not None and not isinstance(found, Stream)
        }
        return Prepared(train=train, eval=held, facts=facts)


class MapSamples:
    """A map-style data set read by index."""

    user_code = True
    weight_hint = 1

    def __init__(self, data: Any, collate: Collate | None, length: int) -> None:
        self._data, self._collate, self._length = data, collate, length

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Any:
        """These samples, collated. Raises DataError that names the sample that failed."""
        items = one_by_one(self._data.__getitem__, indices, seeds, "sample")
        return collated(self._collate, items, indices, seeds[0])


class TableSamples(MapSamples):
    """A Hugging Face data set without a transform: its rows are fetched together."""

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Any:
        with named(f"one of the samples {', '.join(map(str, indices))}"):
            items = self._data.__getitems__(list(indices))
        return collated(self._collate, items, indices, seeds[0])


def _samples(data: Any, collate: Collate | None, name: str) -> Samples | Stream:
    if _is_iterable_only(data):
        if iter(data) is data:
            raise DataError(
                f"{name} of the data set is an iterator, which can be read once. Give an object whose __iter__ starts "
                "anew, such as a torch IterableDataset, or a list of the samples."
            )
        return IterableSamples(data, collate)
    try:
        length = len(data)
        get = data.__getitem__
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"{name} of the data set is a {type(data).__name__}, which has no __len__ and __getitem__ and cannot be "
            "iterated over. Give a PyTorch Dataset or IterableDataset, a Hugging Face Dataset, or a list."
        ) from error
    if length < 1 or get is None:
        raise DataError(f"{name} of the data set has length {length}: there is no sample in it. Check how it is built.")
    if _is_table(data):
        return _table(data, collate, length)
    return MapSamples(data, collate, length)


def _is_iterable_only(data: Any) -> bool:
    """Whether it can only be iterated over. torch's IterableDataset inherits a __getitem__ that does not work."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(data).__mro__}
    iterable = "torch.utils.data.dataset.IterableDataset" in kinds
    return iterable or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


def _is_table(data: Any) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" == "datasets.arrow_dataset.Dataset" for kind in type(data).__mro__)


def _table(data: Any, collate: Collate | None, length: int) -> MapSamples:
    kind = data.format["type"]
    if kind == "custom":  # a transform of the user, which may be random: one sample at a time
        return MapSamples(data, collate, length)
    return TableSamples(data if kind else data.with_format("torch"), collate, length)
