"""Hugging Face datasets: the windows as an Arrow file on disk, `with_format("torch")`, under torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader

from bench.packed import Batch, serve_batches, windows
from bench.texts import Texts


def main() -> None:
    texts = Texts.from_environment()
    place = Path(texts.folder) / "arrow"
    if not place.exists():
        rows = windows(texts)
        flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
        table = pa.table({"row": pa.FixedSizeListArray.from_arrays(flat, texts.context + 1)})
        datasets.Dataset(table).save_to_disk(str(place))
    data = datasets.load_from_disk(str(place)).with_format("torch")
    loader = DataLoader(data, batch_size=texts.batch, shuffle=True, drop_last=True)

    def epoch() -> Iterator[Batch]:
        for batch in loader:
            yield {"tokens": batch["row"][:, :-1], "targets": batch["row"][:, 1:]}

    serve_batches(epoch)


if __name__ == "__main__":
    main()
