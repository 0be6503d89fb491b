"""Tokenise the corpus, say where the tokens are, and with `--read` read every window once in shuffled order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.packed import prepare, total
from bench.texts import Texts
from shardwise.data.loader import open_batches


def main() -> None:
    texts = Texts.from_environment()
    prepared = prepare(texts)
    facts = prepared.facts
    path = Path(facts["tokenizer"]).with_name("train.bin")
    texts.tokens.write_text(json.dumps({"path": str(path), "tokens": facts["tokens"]}))
    if "--read" in sys.argv:
        samples = prepared.train
        steps = len(samples) // texts.batch  # type: ignore[arg-type]
        with open_batches(samples, global_batch=texts.batch, seed=texts.seed, rank=0, ranks=1, steps=steps) as batches:
            sys.stdout.write(f"{total(step.micro[0].batch for step in batches):.0f}\n")


if __name__ == "__main__":
    main()
