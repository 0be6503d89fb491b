"""`text(...)`: any text as packed windows of tokens for a language model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.data import cache, tokens
from shardwise.data.corpus import Corpus, Piece, files
from shardwise.data.pack import Windows
from shardwise.data.perplexity import table_perplexities
from shardwise.data.samples import Prepared
from shardwise.errors import DataError

_FORMAT = 1


def text(
    source: str | os.PathLike[str] | Corpus,
    vocab: int = 4096,
    context: int = 256,
    tokenizer: str | os.PathLike[str] | None = None,
    held_out: float | str | os.PathLike[str] | Corpus = 0.05,
    *,
    end_token: str | None = None,
) -> Text:
    """Text for a language model: batches `{"tokens": int64 [B, context], "targets": int64 [B, context]}`.

    `source`: a file, a folder, `files(...)`, `python_stdlib()` or `rows(...)`. `tokenizer`: None trains a byte-level
    BPE of exactly `vocab` tokens on the training part; "bytes" is one token a byte and an end token (257); a path is
    a tokenizer.json, of at most `vocab` tokens. `held_out`: the share kept for evaluation (0 for none), chosen by
    file from a hash of the names, so that it depends on no seed; or a source of its own.
    Raises DataError for a setting out of range; `prepare` raises DataError for everything wrong with the text.
    """
    if context < 1:
        raise DataError(f"context={context} of the text: a window has at least 1 token.")
    if tokenizer is None and vocab < tokens.SMALLEST_VOCAB:
        raise DataError(
            f"vocab={vocab} of the text: a trained tokenizer has at least {tokens.SMALLEST_VOCAB} tokens (every byte, "
            "and the end of a document). Raise vocab, or use tokenizer='bytes'."
        )
    if isinstance(held_out, int | float) and not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out} of the text: it is a share of the corpus, from 0 to below 1.")
    corpus = files(source) if isinstance(source, str | os.PathLike) else source
    apart = files(held_out) if isinstance(held_out, str | os.PathLike) else held_out
    return Text(corpus, vocab, context, tokenizer, apart, end_token)


@dataclass(frozen=True)
class Text:
    """Made by `text`."""

    corpus: Corpus
    vocab: int
    context: int
    tokenizer: str | os.PathLike[str] | None
    held_out: float | Corpus
    end_token: str | None

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Tokenise once into `cache`, and open it. Nothing here depends on the seed.

        Facts: vocab (tokens of the tokenizer), tokens and documents (training), eval_tokens, eval_documents,
        unigram_perplexity, bigram_perplexity, tokenizer (path), context, windows, eval_windows.
        """
        folder = self._folder(cache)
        facts = json.loads((folder / "facts.json").read_text())
        tokens.check_vocab(facts["vocab"], self.vocab)
        facts["tokenizer"] = str(folder / "tokenizer.json")
        facts["context"] = self.context
        train = self._windows(folder / "train.bin", facts, "tokens")
        facts["windows"] = len(train)
        if not facts["eval_tokens"]:
            return Prepared(train=train, facts=facts)
        held = self._windows(folder / "eval.bin", facts, "eval_tokens")
        facts["eval_windows"] = len(held)
        return Prepared(train=train, eval=held, facts=facts)

    def _folder(self, root: Path) -> Path:
        scan = self.corpus.scan(root)
        if not scan.documents:
            raise DataError(f"The corpus {self.corpus.title} has no text in it. Correct the path or the suffixes.")
        share, apart = self._held_out()
        apart_scan = apart.scan(root) if apart else None
        kind = tokens.tokenizer_key(self.tokenizer)
        size = self.vocab if kind == "trained" else 0
        key = cache.key_of("text", _FORMAT, scan.key, apart_scan and apart_scan.key, share, kind, size, self.end_token)

        def make(made: Path) -> None:
            train, held = self.corpus.split(scan.documents, share)
            self._make(made, train, list(apart_scan.documents) if apart_scan else held)

        return cache.folder(root, "text", key, make)

    def _make(self, made: Path, train: Sequence[Piece], held: Sequence[Piece]) -> None:
        path = tokens.write_tokenizer(made, self.tokenizer, corpus=self.corpus, train=train, vocab=self.vocab)
        tokenizer = tokens.open_tokenizer(path)
        end = tokens.end_of(tokenizer, self.end_token)
        vocab = tokens.size_of(tokenizer)
        tokens.check_vocab(vocab, self.vocab)
        encoder = tokens.encoder_of(tokenizer, self.tokenizer)
        apart = self._held_out()[1] or self.corpus
        counts = [
            tokens.encode(made / name, encoder, end=end, corpus=corpus, pieces=pieces)
            for name, corpus, pieces in (("train.bin", self.corpus, train), ("eval.bin", apart, held))
        ]
        facts: dict[str, Any] = {
            "vocab": vocab,
            "end_token": end,
            "tokens": counts[0][0],
            "documents": counts[0][1],
            "eval_tokens": counts[1][0],
            "eval_documents": counts[1][1],
        }
        if min(found for found, _ in counts) > 1:
            dtype = tokens.token_dtype(vocab)
            facts |= table_perplexities(made / "train.bin", made / "eval.bin", dtype, vocab)
        (made / "facts.json").write_text(json.dumps(facts, indent=1))

    def _held_out(self) -> tuple[float, Corpus | None]:
        """The share of the corpus that is held out, or the corpus that is evaluated on instead."""
        if isinstance(self.held_out, int | float):
            return float(self.held_out), None
        return 0.0, self.held_out

    def _windows(self, path: Path, facts: dict[str, Any], name: str) -> Windows:
        found = Windows(path, tokens.token_dtype(facts["vocab"]), tokens=facts[name], context=self.context)
        if not len(found):
            part = "corpus" if name == "tokens" else "held-out part of the corpus"
            cure = "" if name == "tokens" else " Or set held_out to a larger share, or to 0 for none."
            raise DataError(
                f"The {part} {self.corpus.title} has {facts[name]} tokens, fewer than one window: "
                f"context={self.context} needs {self.context + 1}. Use more text or a smaller context.{cure}"
            )
        return found
