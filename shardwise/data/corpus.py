"""Text on disk as documents: which files, their content's name, what is held out, and reading them piece by piece."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from shardwise.data import cache
from shardwise.errors import DataError

CHUNK_BYTES = 64 * 1024
_READ_BYTES = 1 << 18
_RACY_NS = 2_000_000_000


class Piece(NamedTuple):
    """A document: `size` units of `name` from `start`; bytes of a file, or rows of a table (one document each)."""

    name: str
    start: int
    size: int


class Scan(NamedTuple):
    """The documents of a corpus and a key that changes whenever a byte or a name of them does."""

    key: str
    documents: tuple[Piece, ...]


class Corpus(Protocol):
    """Where documents come from."""

    @property
    def title(self) -> str:
        """The corpus as an error message names it."""

    def scan(self, root: Path) -> Scan:
        """List the documents, in an order that depends on nothing but them; `root` is the cache."""

    def split(self, documents: Sequence[Piece], share: float) -> tuple[list[Piece], list[Piece]]:
        """Training and held-out documents, about `share` of the corpus in the latter; not random."""

    def bytes_of(self, pieces: Sequence[Piece]) -> int:
        """About how much text they are."""

    def read(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        """The text of a piece in chunks of at most about CHUNK_BYTES, and whether a document ends with each."""


def files(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    suffixes: Sequence[str] | None = None,
    *,
    unreadable: Literal["error", "skip"] = "error",
) -> Files:
    """A text file, a folder (with all folders below it, hidden ones left out), or several of both.

    `suffixes` such as (".txt", ".md") chooses files in folders. A file that is not UTF-8 text is an error, or is
    left out with `unreadable="skip"`.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if isinstance(suffixes, str):
        suffixes = (suffixes,)
    return Files(tuple(os.fspath(one) for one in paths), tuple(suffixes) if suffixes else None, unreadable == "skip")


def python_stdlib() -> Files:
    """The source of the running interpreter's own standard library, without installed packages."""
    return Files((sysconfig.get_paths()["stdlib"],), (".py",), True)


@dataclass(frozen=True)
class Files:
    """A corpus of files; each is one document. Made by `files` and `python_stdlib`."""

    paths: tuple[str, ...]
    suffixes: tuple[str, ...] | None
    skip_unreadable: bool
    skip_folders: tuple[str, ...] = ("site-packages", "dist-packages", "__pycache__")

    @property
    def title(self) -> str:
        return ", ".join(f"'{path}'" for path in self.paths)

    def scan(self, root: Path) -> Scan:
        """Content is read again only after a file's size, inode or times changed. Raises DataError."""
        found = [(name, path, os.stat(path)) for name, path in self._listed()]
        stats = [[name, path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, path, s in found]
        memo_key = cache.key_of("scan", 1, self.skip_unreadable, stats)
        memo = root / "scan" / memo_key
        if cache.is_whole(memo):
            known = json.loads((memo / "scan.json").read_text())
            return Scan(known["key"], tuple(Piece(*piece) for piece in known["documents"]))
        scan = self._read_through([(name, path, s.st_size) for name, path, s in found])
        newest = max((max(s.st_mtime_ns, s.st_ctime_ns) for _, _, s in found), default=0)
        if time.time_ns() - newest > _RACY_NS:  # a file may still change within the clock's grain: then do not remember
            text = json.dumps({"key": scan.key, "documents": scan.documents})
            cache.folder(root, "scan", memo_key, lambda made: _write_text(made / "scan.json", text))
        return scan

    def split(self, documents: Sequence[Piece], share: float) -> tuple[list[Piece], list[Piece]]:
        """Whole files, in the order of a hash of their name, no single one dominating; of a few files, their ends."""
        if not share:
            return list(documents), []
        budget = share * sum(piece.size for piece in documents)
        for largest in (budget / 10, budget):
            held = self._by_name(documents, budget, largest)
            if sum(piece.size for piece in held) >= budget / 2:
                taken = set(held)
                return [piece for piece in documents if piece not in taken], held
        cuts = [(piece, _line_start(piece, int(piece.size * (1 - share)))) for piece in documents]
        train = [Piece(piece.name, 0, cut) for piece, cut in cuts if cut]
        return train, [Piece(piece.name, cut, piece.size - cut) for piece, cut in cuts if cut < piece.size]

    def _by_name(self, documents: Sequence[Piece], budget: float, largest: float) -> list[Piece]:
        held, left = set(), budget
        for piece in sorted(documents, key=lambda piece: _rank(self._relative(piece.name))):
            if piece.size <= min(largest, left):
                held.add(piece)
                left -= piece.size
        return [piece for piece in documents if piece in held]

    def bytes_of(self, pieces: Sequence[Piece]) -> int:
        return sum(piece.size for piece in pieces)

    def read(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        """Chunks end at a line's end where there is one, else between two characters. Raises DataError."""
        left, kept = piece.size, b""
        try:
            with open(piece.name, "rb") as file:
                file.seek(piece.start)
                while left:
                    raw = file.read(min(CHUNK_BYTES, left))
                    if not raw:
                        raise DataError(
                            f"'{piece.name}' became shorter while it was read. Run again when it is at rest."
                        )
                    left -= len(raw)
                    kept += raw
                    cut = len(kept) if not left else _cut(kept)
                    if cut:
                        yield kept[:cut].decode("utf-8"), not left
                        kept = kept[cut:]
        except OSError as error:
            raise _unreadable(piece.name, error) from error
        except UnicodeDecodeError as error:
            raise DataError(f"'{piece.name}' changed while it was read and is not UTF-8 text any more.") from error

    def _relative(self, path: str) -> str:
        """The name that a file's hash is taken of: the same wherever the corpus lies."""
        for top in self.paths:
            base = os.path.abspath(top)
            if os.path.isdir(base) and path.startswith(base + os.sep):
                return os.path.relpath(path, base).replace(os.sep, "/")
        return os.path.basename(path)

    def _listed(self) -> list[tuple[str, str]]:
        """(relative name, absolute path) of every file, sorted, each path once."""
        found: dict[str, None] = {}
        for top in self.paths:
            base = os.path.abspath(top)
            if os.path.isdir(base):
                found.update(dict.fromkeys(self._walk(base)))
            elif os.path.exists(base):
                found[base] = None
            else:
                raise DataError(
                    f"There is no file or folder '{top}' (looked for {base}). Correct the path of the text."
                )
        return sorted((self._relative(path), path) for path in found)

    def _walk(self, base: str) -> Iterator[str]:
        for folder, folders, names in os.walk(base, onerror=_raise):
            folders[:] = [name for name in folders if name not in self.skip_folders and not name.startswith(".")]
            for name in names:
                wanted = self.suffixes is None or name.endswith(self.suffixes)
                path = os.path.join(folder, name)
                if wanted and not name.startswith(".") and os.path.isfile(path):
                    yield path

    def _read_through(self, found: list[tuple[str, str, int]]) -> Scan:
        names = hashlib.sha256()
        documents = []
        for name, path, size in found:
            if not size:
                continue
            digest, fault = _check(path)
            if fault and not self.skip_unreadable:
                raise DataError(fault)
            if not fault:
                names.update(f"{name}\0{size}\0{digest}\n".encode("utf-8", "surrogateescape"))
                documents.append(Piece(path, 0, size))
        return Scan(names.hexdigest(), tuple(documents))


def _check(path: str) -> tuple[str, str]:
    """The sha256 of a file's bytes, and why it is not text ('' when it is).

    Decodes block by block by hand: codecs' incremental decoder lets resident memory grow with the file.
    """
    digest = hashlib.sha256()
    offset, rest = 0, b""
    try:
        with open(path, "rb") as file:
            while raw := file.read(_READ_BYTES):
                digest.update(raw)
                block = rest + raw
                whole = _whole_characters(block)
                if b"\0" in block:
                    return "", _not_text(path, "a NUL byte", offset + block.index(0))
                try:
                    block[:whole].decode("utf-8")
                except UnicodeDecodeError as error:
                    return "", _not_text(path, f"bytes that are not UTF-8 ({error.reason})", offset + error.start)
                offset += whole
                rest = block[whole:]
        if rest:
            return "", _not_text(path, "half a UTF-8 character at its end", offset)
    except OSError as error:
        return "", str(_unreadable(path, error))
    return digest.hexdigest(), ""


def _whole_characters(block: bytes) -> int:
    """How much of a block is left without a character that is cut off at its end."""
    for back in range(1, min(3, len(block)) + 1):
        byte = block[-back]
        if byte & 0xC0 != 0x80:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return len(block) - back if length > back else len(block)
    return len(block)


def _not_text(path: str, what: str, offset: int) -> str:
    return (
        f"'{path}' is not text: it has {what} at byte offset {offset}. Convert it to UTF-8, choose the text files of "
        "its folder with files(path, suffixes=...), or leave such files out with files(path, unreadable='skip')."
    )


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"'{path}' cannot be read: {error.strerror}. Correct its permissions or the path of the text.")


def _raise(error: OSError) -> None:
    raise DataError(f"The folder '{error.filename}' cannot be read: {error.strerror}.") from error


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _cut(raw: bytes) -> int:
    """Where to end a chunk: after the last line, or, in a line longer than a chunk, before a split character."""
    line = raw.rfind(b"\n") + 1
    if line or len(raw) < CHUNK_BYTES:
        return line
    cut = len(raw) - 1
    while raw[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _line_start(piece: Piece, near: int) -> int:
    """The first line start at or after `near`; in a file without one, the next start of a character."""
    with open(piece.name, "rb") as file:
        file.seek(near)
        after = file.read(_READ_BYTES)
    line = after.find(b"\n") + 1
    if line and near + line < piece.size:
        return near + line
    cut = next((at for at, byte in enumerate(after) if byte & 0xC0 != 0x80), len(after))
    return near + cut


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
