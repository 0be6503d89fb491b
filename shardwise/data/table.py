"""`rows(...)`: a text column of a Hugging Face data set as a corpus, each row a document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.data.corpus import CHUNK_BYTES, Piece, Scan
from shardwise.errors import DataError

_ROWS_A_PIECE = 64
_MEASURED_ROWS = 256


def rows(dataset: Any, column: str = "text") -> Rows:
    """The strings in `column` of a `datasets.Dataset`, for `text(...)`. Raises DataError when it is not there."""
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or column not in names:
        raise DataError(f"The data set has no column '{column}'; it has {names or 'no named columns'}. Set column=...")
    return Rows(dataset, column)


@dataclass(frozen=True)
class Rows:
    """Made by `rows`. A piece is a run of rows."""

    dataset: Any
    column: str

    @property
    def title(self) -> str:
        return f"column '{self.column}' of the data set"

    def scan(self, root: Path) -> Scan:
        """The key is the data set's own fingerprint, which follows its content and how it was made."""
        count = len(self.dataset)
        size = max(1, min(_ROWS_A_PIECE, count // 1000))
        pieces = tuple(Piece(self.column, start, min(size, count - start)) for start in range(0, count, size))
        return Scan(f"{self.dataset._fingerprint}/{self.column}/{count}", pieces)

    def split(self, documents: Sequence[Piece], share: float) -> tuple[list[Piece], list[Piece]]:
        """Runs of rows by a hash of their number."""
        count = round(share * len(documents))
        if share and len(documents) > 1:
            count = min(max(count, 1), len(documents) - 1)
        taken = set(sorted(documents, key=lambda piece: hashlib.sha256(b"%d" % piece.start).digest())[:count])
        return [piece for piece in documents if piece not in taken], [piece for piece in documents if piece in taken]

    def bytes_of(self, pieces: Sequence[Piece]) -> int:
        """Estimated from some hundred rows."""
        total = sum(piece.size for piece in pieces)
        some = pieces[:: max(1, len(pieces) // _MEASURED_ROWS)]
        measured = [len(self.dataset[piece.start][self.column].encode()) for piece in some]
        return round(total * sum(measured) / max(1, len(measured)))

    def read(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        """Raises DataError for a row that is not a string."""
        for at, text in enumerate(self.dataset[piece.start : piece.start + piece.size][self.column]):
            if not isinstance(text, str):
                raise DataError(
                    f"Row {piece.start + at} in {self.title} is a {type(text).__name__}, not a string. "
                    "Leave such rows out with the data set's filter()."
                )
            for start in range(0, max(1, len(text)), CHUNK_BYTES):
                yield text[start : start + CHUNK_BYTES], start + CHUNK_BYTES >= len(text)
