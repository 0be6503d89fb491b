"""Text to a file of tokens: train or load a tokenizer, encode in bounded memory, append."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shardwise.data.corpus import Corpus, Piece
from shardwise.data.encoders import WORDS, ByteEncoder, Encoder, LibraryEncoder, WordEncoder
from shardwise.errors import DataError

END = "<|end|>"
KNOWN_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
SMALLEST_VOCAB = 257  # every byte, and the end token
_BATCH_BYTES = 512 * 1024
_SAMPLE_BYTES = (8 << 20, 64 << 20)
_SAMPLE_BYTES_A_TOKEN = 2048


def token_dtype(vocab: int) -> npt.DTypeLike:
    """The smallest of uint16 and uint32 that holds tokens 0..vocab-1."""
    return np.uint16 if vocab <= 1 << 16 else np.uint32


def tokenizer_key(tokenizer: str | os.PathLike[str] | None) -> str:
    """What a cache key needs to know of the choice: `trained`, `bytes`, or the content of a tokenizer.json."""
    if tokenizer is None:
        return "trained"
    if tokenizer == "bytes":
        return "bytes"
    try:
        return hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"tokenizer='{os.fspath(tokenizer)}' cannot be read: {error.strerror}. Give the path of a tokenizer.json, "
            "'bytes', or None to train one on the corpus."
        ) from error


def write_tokenizer(
    made: Path, tokenizer: str | os.PathLike[str] | None, *, corpus: Corpus, train: Sequence[Piece], vocab: int
) -> Path:
    """Put the chosen tokenizer into `made`/tokenizer.json. Raises DataError when the corpus has no `vocab` tokens."""
    target = made / "tokenizer.json"
    if tokenizer is None:
        train_bpe(sample(corpus, train, vocab), vocab).save(str(target))
        _trim()
    elif tokenizer == "bytes":
        bytes_tokenizer().save(str(target))
    else:
        shutil.copyfile(tokenizer, target)
    return target


def train_bpe(texts: Iterator[str], vocab: int, specials: Sequence[str] = (END,)) -> Any:
    """A byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2) of exactly `vocab` tokens, the specials first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), by_byte])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    with parallel_tokenizers():
        made.train_from_iterator(texts, trainer)
    if made.get_vocab_size() < vocab:
        raise DataError(
            f"vocab={vocab} is more than this corpus supports: it gives {made.get_vocab_size()} different tokens. "
            f"Set vocab to {made.get_vocab_size()} or less, or use more text."
        )
    return made


def bytes_tokenizer() -> Any:
    """Token = byte, 256 = the end of a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True)])
    return made


def open_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises DataError."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(os.fspath(path))
        found.no_truncation()
        found.no_padding()
        return found
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"'{os.fspath(path)}' is not a tokenizer.json that the tokenizers library reads: {error}."
        ) from error


def size_of(tokenizer: Any) -> int:
    """One above the largest id, which can be more than the number of tokens."""
    return 1 + max(int(token) for token in tokenizer.get_vocab(with_added_tokens=True).values())


def check_vocab(size: int, vocab: int) -> None:
    """Raises DataError when a tokenizer of `size` tokens gives ids that a model of `vocab` tokens does not have."""
    if size > vocab:
        raise DataError(
            f"The tokenizer has {size} tokens, more than vocab={vocab}. Set vocab={size}, in the model too."
        )


def end_of(tokenizer: Any, end_token: str | None) -> int:
    """The id that ends a document. Raises DataError when there is none."""
    for token in (end_token,) if end_token else KNOWN_ENDS:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    wanted = f"no token '{end_token}'" if end_token else f"none of the usual end tokens ({', '.join(KNOWN_ENDS)})"
    raise DataError(f"The tokenizer has {wanted}. Name the token that ends a document with end_token=...")


def sample_bytes(vocab: int) -> int:
    """How much text to train `vocab` tokens on: 2 KiB for each, from 8 to 64 MiB. More costs time and memory, and
    changed the length of the encoded standard library by less than 1 %."""
    least, most = _SAMPLE_BYTES
    return min(most, max(least, _SAMPLE_BYTES_A_TOKEN * vocab))


def sample(corpus: Corpus, pieces: Sequence[Piece], vocab: int) -> Iterator[str]:
    """Chunks drawn evenly over the corpus, enough to train `vocab` tokens on."""
    share = min(1.0, sample_bytes(vocab) / max(1, corpus.bytes_of(pieces)))
    credit = 0.0
    for piece in pieces:
        for text, _ in corpus.read(piece):
            credit += len(text) * share
            if credit >= len(text):
                credit -= len(text)
                yield text


def encoder_of(tokenizer: Any, choice: str | os.PathLike[str] | None) -> Encoder:
    """The quickest encoder for a tokenizer that was chosen by `choice`, as `text(tokenizer=...)` has it."""
    dtype = token_dtype(size_of(tokenizer))
    if choice == "bytes":
        return ByteEncoder(dtype)
    return WordEncoder(tokenizer, dtype) if choice is None else LibraryEncoder(tokenizer, dtype)


def encode(path: Path, encoder: Encoder, *, end: int, corpus: Corpus, pieces: Sequence[Piece]) -> tuple[int, int]:
    """Write the tokens of every document and its end token to a new file; returns how many tokens and documents.

    Holds half a megabyte of text and its tokens at a time.
    """
    total, documents, size = 0, 0, 0
    texts: list[tuple[str, bool]] = []
    with open(path, "wb") as out, parallel_tokenizers():
        for piece in pieces:
            for chunk in corpus.read(piece):
                texts.append(chunk)
                size += len(chunk[0])
                documents += chunk[1]
                if size >= _BATCH_BYTES:
                    total += _append(out, texts, encoder, end)
                    texts, size = [], 0
        total += _append(out, texts, encoder, end)
    return total, documents


def _append(out: BinaryIO, texts: list[tuple[str, bool]], encoder: Encoder, end: int) -> int:
    found = encoder.encode([text for text, _ in texts])
    if not found:
        return 0
    stop = np.array([end], dtype=found[0].dtype)
    parts = [part for ids, (_, last) in zip(found, texts, strict=True) for part in ((ids, stop) if last else (ids,))]
    joined = np.concatenate(parts)
    out.write(joined.data)
    return len(joined)


@contextlib.contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Let the library use its threads here, unless the user has decided or this is a fork of a process that used them.

    Afterwards they are off, since a child forked later would wait for threads that it does not have. The word `off`
    tells our own setting from the user's.
    """
    name, ours = "TOKENIZERS_PARALLELISM", "off"
    if os.environ.get(name, ours) != ours or _owner_of_threads() != os.getpid():
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = ours


@functools.cache
def _owner_of_threads() -> int:
    """The process that first used the library's threads; a fork inherits the answer, not the threads."""
    return os.getpid()


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def _trim() -> None:
    """Give the trainer's freed memory back to the system (glibc keeps it otherwise)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
