"""Text to token ids, three ways: by byte, by word with a memory of words, or by whatever a tokenizer.json says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# Where a trained BPE splits words: letters with the space before them (all beyond ASCII counts as letters), English
# contractions, punctuation, digits, and runs of white space but for the space of the next word. This is GPT-2's rule
# in explicit ranges, so that Python's `re` and the tokenizers library split alike.
WORDS = (
    r" ?[^\x00-@\[-`{-\x7f]+|'(?:[sdmt]|ll|ve|re)| ?[\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f]+| ?[0-9]+"
    r"|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+"
)
_KNOWN_BYTES = 16 << 20
_WORD_BYTES = 120  # what a remembered word costs besides its characters


class Encoder(Protocol):
    """Texts to tokens. Text that looks like a special token is encoded as ordinary text."""

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The tokens of each text, read-only."""


class ByteEncoder:
    """Token = byte of the UTF-8 text."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self._dtype) for text in texts]


class WordEncoder:
    """For tokenizers that split by `WORDS`: each different word is encoded by the library once, then looked up.

    Four times the library's speed on one core, since text repeats its words. Memory is bounded: a full store of
    words is emptied.
    """

    def __init__(self, tokenizer: Any, dtype: npt.DTypeLike) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer, self._dtype = tokenizer, dtype
        self._split = re.compile(WORDS).findall
        self._known: dict[str, bytes] = {}
        self._known_bytes = 0

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        split = [self._split(text) for text in texts]
        if self._known_bytes > _KNOWN_BYTES:
            self._known.clear()
            self._known_bytes = 0
        self._learn({word for words in split for word in set(words) if word not in self._known})
        ids_of = self._known.__getitem__
        return [np.frombuffer(b"".join(map(ids_of, words)), dtype=self._dtype) for words in split]

    def _learn(self, words: set[str]) -> None:
        new = list(words)
        for word, one in zip(new, self._tokenizer.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self._known[word] = np.array(one.ids, dtype=self._dtype).tobytes()
            self._known_bytes += len(word) + _WORD_BYTES


class LibraryEncoder:
    """Any tokenizer, through the library."""

    def __init__(self, tokenizer: Any, dtype: npt.DTypeLike) -> None:
        tokenizer.encode_special_tokens = True
        self._tokenizer, self._dtype = tokenizer, dtype

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=self._dtype) for one in encoded]
