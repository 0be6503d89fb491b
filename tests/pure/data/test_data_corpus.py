"""Text files as documents: listing, content keys, the held-out split, chunked reading, and bad files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data import corpus
from shardwise.data.corpus import CHUNK_BYTES, Files, Piece, files
from shardwise.errors import DataError
from tests.examples import examples


def many(top: Path, count: int = 60, size: int = 400) -> Path:
    for number in range(count):
        place = top / f"part{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.txt").write_text(f"document {number}\n" * (size // 12))
    return top


def read_all(found: Files, pieces: list[Piece] | tuple[Piece, ...]) -> str:
    return "".join(text for piece in pieces for text, _ in found.read(piece))


def test_documents_are_sorted_and_hidden_cached_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a.txt",
        "sub/c.txt",
        ".hidden.txt",
        ".git/d.txt",
        "site-packages/e.txt",
        "f.md",
        "empty.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    found = files(tmp_path, ".txt").scan(tmp_path / "cache")
    assert [os.path.relpath(piece.name, tmp_path) for piece in found.documents] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [piece.size for piece in found.documents] == [5, 5, 9]


def test_the_key_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    one, two = many(tmp_path / "one"), many(tmp_path / "two")
    key = files(one).scan(tmp_path / "cache").key
    assert files(two).scan(tmp_path / "cache").key == key
    (two / "part0" / "0.txt").write_text("document x\n")
    assert files(two).scan(tmp_path / "cache").key != key
    (one / "part0" / "0.txt").rename(one / "part0" / "1.txt")
    assert files(one).scan(tmp_path / "cache").key != key


def test_a_file_at_rest_is_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(tmp_path / "text", 5)
    monkeypatch.setattr(corpus.time, "time_ns", lambda: time.perf_counter_ns() + 10**19)  # long after the last write
    first = files(tmp_path / "text").scan(tmp_path / "cache")
    monkeypatch.setattr(corpus, "_check", lambda path: pytest.fail(f"{path} was read again"))
    assert files(tmp_path / "text").scan(tmp_path / "cache") == first


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    many(tmp_path / "text", 5)
    files(tmp_path / "text").scan(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_held_out_files_follow_their_names_and_fill_the_share(tmp_path: Path) -> None:
    found = files(many(tmp_path / "text", 300))
    documents = found.scan(tmp_path / "cache").documents
    train, held = found.split(documents, 0.05)
    assert sorted(train + held) == sorted(documents)
    total = sum(piece.size for piece in documents)
    assert 0.025 * total <= sum(piece.size for piece in held) <= 0.05 * total
    elsewhere = files(many(tmp_path / "moved", 300))
    again = elsewhere.split(elsewhere.scan(tmp_path / "cache").documents, 0.05)[1]
    assert [os.path.basename(p.name) for p in again] == [os.path.basename(p.name) for p in held]


def test_one_large_file_does_not_make_the_held_out_part() -> None:
    documents = [Piece(f"/t/{number}", 0, 1000) for number in range(400)] + [Piece("/t/large", 0, 15_000)]
    for rename in range(20):  # whatever its hash
        documents[-1] = Piece(f"/t/large{rename}", 0, 15_000)
        held = Files(("/t",), None, False).split(documents, 0.05)[1]
        assert documents[-1] not in held


@examples(25)
@given(
    st.lists(st.text(st.sampled_from("ab\n\u00e9\U0001f600"), max_size=60), min_size=1, max_size=4),
    st.floats(0.05, 0.9),
)
def test_of_a_few_files_the_ends_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], share: float
) -> None:
    top = tmp_path_factory.mktemp("few")
    for number, text in enumerate(texts):
        (top / f"{number}.txt").write_text(text, encoding="utf-8")
    found = files(top)
    documents = found.scan(top / ".cache").documents
    train, held = found.split(documents, share)
    for number, text in enumerate(texts):
        name = str(top / f"{number}.txt")
        first, last = (read_all(found, [p for p in part if p.name == name]) for part in (train, held))
        assert first + last == text


def test_an_explicit_zero_holds_nothing_out(tmp_path: Path) -> None:
    found = files(many(tmp_path))
    documents = found.scan(tmp_path / "cache").documents
    assert found.split(documents, 0) == (list(documents), [])


@pytest.mark.parametrize("line", [100, 10 * CHUNK_BYTES])
def test_a_large_file_comes_in_chunks_that_join_to_it(tmp_path: Path, line: int) -> None:
    text = ("\u00e9" * line + "\n") * (5 * CHUNK_BYTES // (2 * line) + 1)
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    found = files(tmp_path / "large.txt")
    chunks = list(found.read(found.scan(tmp_path / "cache").documents[0]))
    assert "".join(chunk for chunk, _ in chunks) == text
    assert max(len(chunk.encode()) for chunk, _ in chunks) <= 2 * CHUNK_BYTES
    assert [last for _, last in chunks] == [False] * (len(chunks) - 1) + [True]
    if line == 100:
        assert all(chunk.endswith("\n") for chunk, _ in chunks)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"text" * 300_000 + b"\0 more", "a NUL byte at byte offset 1200000"),
        (b"text" * 300_000 + b"\xff\xfe", "not UTF-8 .* at byte offset 1200000"),
        (b"x" * ((1 << 20) - 1) + b"\xc3\x28", "not UTF-8 .* at byte offset 1048575"),
        ("caf\u00e9".encode()[:-1], "half a UTF-8 character at its end at byte offset 3"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_the_offset(tmp_path: Path, raw: bytes, what: str) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "odd.bin").write_bytes(raw)
    with pytest.raises(DataError, match=rf"odd\.bin' is not text: it has .*{what}"):
        files(tmp_path).scan(tmp_path / ".cache")
    found = files(tmp_path, unreadable="skip").scan(tmp_path / ".cache")
    assert [os.path.basename(piece.name) for piece in found.documents] == ["good.txt"]


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder '.*nowhere'"):
        files(tmp_path / "nowhere").scan(tmp_path)


def test_a_file_that_shrinks_while_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match="became shorter"):
        list(files(tmp_path / "a.txt").read(Piece(str(tmp_path / "a.txt"), 0, 100)))


def test_the_standard_library_is_found_without_installed_packages(tmp_path: Path) -> None:
    found = corpus.python_stdlib().scan(tmp_path).documents
    names = [piece.name for piece in found]
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert names == sorted(names, key=lambda name: os.path.relpath(name, corpus.python_stdlib().paths[0]))


@given(st.text(), st.integers(1, 7), st.booleans(), st.integers(0, 40))
def test_blocks_may_cut_characters_and_faults_are_where_python_finds_them(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int, spoil: bool, at: int
) -> None:
    raw = bytearray(text.replace("\0", "").encode())
    if spoil and raw:
        raw[at % len(raw)] ^= 0x80
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_READ_BYTES", block)
        _, fault = corpus._check(str(path))
    if b"\0" in raw:
        assert fault
    else:
        assert fault.partition("at byte offset ")[2].partition(".")[0] == first_fault(bytes(raw))


def first_fault(raw: bytes) -> str:
    """Where Python finds the first byte that is not UTF-8; '' when there is none."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return str(error.start)
    return ""
