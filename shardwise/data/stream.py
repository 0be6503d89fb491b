"""Iterable data sets: a sample's index is its place in the stream; every rank reads all and keeps its own share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shardwise.data.order import stream_seed
from shardwise.data.samples import Stream
from shardwise.data.seeding import seed_generators
from shardwise.data.user_code import Collate, collated, named
from shardwise.errors import DataError

_END = object()


class IterableSamples(Stream):
    """A cursor over epochs of an iterable data set.

    The generators are seeded before every sample, kept or not, so that all ranks see the same stream even when it
    draws at random. Going back to an earlier position starts the run's stream again.
    """

    user_code = True
    weight_hint = 1

    def __init__(self, data: Any, collate: Collate | None) -> None:
        self._data, self._collate = data, collate
        self._restart()
        self._length = 0  # of one epoch; 0 until one has ended

    def read(self, positions: Sequence[int], seed: int) -> tuple[Any, list[int]]:
        """The batch at these ascending positions. Raises DataError when a sample fails or the stream is empty."""
        items, places = [], []
        for position in positions:
            if position < self._position:
                self._restart()
            while self._position < position:
                self._jump(position)
                if self._position < position:
                    self._advance(seed)
            item, place = self._advance(seed)
            items.append(item)
            places.append(place)
        return collated(self._collate, items, places, stream_seed(seed, positions[0])), places

    def once(self, batch: int, ranks: int, rank: int) -> Iterator[Any]:
        """The batches `rank`, `rank` + `ranks` ... of one pass. Raises DataError."""
        iterator = self._begin(0)
        place, items = 0, []
        while True:
            item = self._next(iterator, stream_seed(0, place), place)
            if item is not _END and place // batch % ranks == rank:
                items.append(item)
            if items and (item is _END or len(items) == batch):
                first = place - len(items) + (item is not _END)
                yield collated(self._collate, items, range(first, first + len(items)), stream_seed(0, first))
                items = []
            if item is _END:
                break
            place += 1
        if not place:
            raise self._empty()

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self._data, "collate": self._collate}  # an open iterator does not travel to a spawned worker

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["data"], state["collate"])  # type: ignore[misc]

    def _restart(self) -> None:
        self._iterator: Iterator[Any] | None = None
        self._position = self._epoch = self._place = 0

    def _jump(self, position: int) -> None:
        """Pass over whole epochs without reading them, which is possible once their length is known."""
        if not self._length:
            return
        epochs = (position - self._position + self._place) // self._length
        if epochs > 0:
            self._position += epochs * self._length - self._place
            self._epoch += epochs
            self._place, self._iterator = 0, None

    def _advance(self, seed: int) -> tuple[Any, int]:
        """The next sample of the run and its place in its epoch."""
        own = stream_seed(seed, self._position)
        if self._iterator is None:
            seed_generators(own)
            self._iterator = self._begin(self._epoch)
        item = self._next(self._iterator, own, self._place)
        if item is _END:
            if not self._place:
                raise self._empty()
            self._length = self._place
            self._epoch += 1
            self._place, self._iterator = 0, None
            return self._advance(seed)
        self._position += 1
        self._place += 1
        return item, self._place - 1

    def _begin(self, epoch: int) -> Iterator[Any]:
        with named(f"starting epoch {epoch} of the iterable data set"):
            set_epoch = getattr(self._data, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
            return iter(self._data)

    def _next(self, iterator: Iterator[Any], seed: int, place: int) -> Any:
        seed_generators(seed)
        with named(f"sample {place} of the iterable data set"):
            return next(iterator, _END)

    def _empty(self) -> DataError:
        return DataError("The iterable data set gave no sample at all. Check how it is built.")
