"""Shardwise's loader, as the training loop opens it: one rank, nothing beside its own prefetching thread."""

from __future__ import annotations

from collections.abc import Iterator

from bench.packed import Batch, prepare, serve_batches
from bench.texts import Texts
from shardwise.data.loader import open_batches


def main() -> None:
    texts = Texts.from_environment()
    samples = prepare(texts).train
    steps = len(samples) // texts.batch  # type: ignore[arg-type]

    def epoch() -> Iterator[Batch]:
        with open_batches(samples, global_batch=texts.batch, seed=texts.seed, rank=0, ranks=1, steps=steps) as batches:
            for step in batches:
                yield step.micro[0].batch

    serve_batches(epoch)


if __name__ == "__main__":
    main()
