"""Text to token files: tokenizers, the end token, caching, facts, bounded memory, and bad settings."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data import encoders, tokens
from shardwise.data import text as text_module
from shardwise.data.corpus import files
from shardwise.data.encoders import LibraryEncoder, WordEncoder
from shardwise.data.perplexity import table_perplexities
from shardwise.data.text import text
from shardwise.errors import DataError
from tests.examples import examples

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "hears",
    "likes",
    "house",
    "of",
    "in",
    "on",
    "and",
    "\u00e9t\u00e9",
    "na\u00efve",
]


def stories(top: Path, count: int = 80, length: int = 120) -> Path:
    generator = np.random.default_rng(0)
    top.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        words = generator.choice(WORDS, length)
        (top / f"{number:03}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return top


def folder_of(prepared: Any) -> Path:
    return Path(prepared.facts["tokenizer"]).parent


def token_file(prepared: Any, name: str) -> np.ndarray:
    return np.fromfile(folder_of(prepared) / name, dtype=np.uint16)


def test_a_trained_tokenizer_decodes_to_the_documents(tmp_path: Path) -> None:
    source = files(stories(tmp_path / "text"))
    prepared = text(source, vocab=300, context=16, held_out=0.1).prepare(tmp_path / "cache")
    facts = prepared.facts
    tokenizer = tokens.open_tokenizer(facts["tokenizer"])
    train, held = source.split(source.scan(tmp_path / "cache").documents, 0.1)
    for name, part, count in (("train.bin", train, "tokens"), ("eval.bin", held, "eval_tokens")):
        stored = token_file(prepared, name)
        assert len(stored) == facts[count]
        documents = np.split(stored, np.flatnonzero(stored == facts["end_token"]) + 1)
        assert len(documents[-1]) == 0  # the last one is ended too
        found = [tokenizer.decode(document[:-1].tolist()) for document in documents[:-1]]
        assert found == [Path(piece.name).read_text(encoding="utf-8") for piece in part]
    assert (facts["vocab"], facts["documents"], facts["eval_documents"]) == (300, len(train), len(held))
    assert tokenizer.get_vocab_size() == 300


def test_bytes_are_the_tokens_and_the_tokenizer_file_agrees(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("na\u00efve\nline\n" * 50, encoding="utf-8")
    prepared = text(tmp_path / "a.txt", tokenizer="bytes", context=8, held_out=0).prepare(tmp_path / "cache")
    raw = (tmp_path / "a.txt").read_bytes()
    assert token_file(prepared, "train.bin").tolist() == [*raw, 256]
    tokenizer = tokens.open_tokenizer(prepared.facts["tokenizer"])
    assert tokenizer.encode(raw.decode()).ids == list(raw)
    assert tokenizer.decode(list(raw)) == raw.decode()
    assert prepared.eval is None
    assert prepared.facts["vocab"] == 257


def test_a_given_tokenizer_is_used_and_checked(tmp_path: Path) -> None:
    made = text(stories(tmp_path / "text"), vocab=300, context=8).prepare(tmp_path / "cache")
    given = text(tmp_path / "text", vocab=300, context=8, tokenizer=made.facts["tokenizer"]).prepare(tmp_path / "cache")
    assert folder_of(given) != folder_of(made)
    assert np.array_equal(token_file(given, "train.bin"), token_file(made, "train.bin"))
    for cache in ("cache", "fresh"):  # also when the tokens are there already
        with pytest.raises(DataError, match="300 tokens, more than vocab=290. Set vocab=300"):
            text(tmp_path / "text", vocab=290, context=8, tokenizer=made.facts["tokenizer"]).prepare(tmp_path / cache)


def test_a_tokenizer_needs_a_known_end_token(tmp_path: Path) -> None:
    stories(tmp_path / "text", 4)
    made = tokens.train_bpe(iter(["some text"]), 257, ["[STOP]"])
    made.save(str(tmp_path / "tokenizer.json"))
    described = text(tmp_path / "text", context=8, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="none of the usual end tokens"):
        described.prepare(tmp_path / "cache")
    named = text(tmp_path / "text", context=8, tokenizer=tmp_path / "tokenizer.json", end_token="[STOP]")
    assert named.prepare(tmp_path / "cache").facts["end_token"] == made.token_to_id("[STOP]")


def test_the_second_call_only_opens_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = text(stories(tmp_path / "text"), vocab=300, context=16)
    first = described.prepare(tmp_path / "cache", seed=0)
    monkeypatch.setattr(text_module.Text, "_make", lambda *a: pytest.fail("tokenised again"))
    assert described.prepare(tmp_path / "cache", seed=7).facts == first.facts
    wider = text(tmp_path / "text", vocab=300, context=32).prepare(tmp_path / "cache")  # windows are cut when opened
    assert wider.facts["windows"] == (first.facts["tokens"] - 1) // 32


def test_changed_text_or_settings_are_prepared_anew(tmp_path: Path) -> None:
    stories(tmp_path / "text")
    found = {folder_of(text(tmp_path / "text", vocab=300, context=8).prepare(tmp_path / "cache"))}
    found.add(folder_of(text(tmp_path / "text", vocab=301, context=8).prepare(tmp_path / "cache")))
    found.add(folder_of(text(tmp_path / "text", vocab=300, context=8, held_out=0.1).prepare(tmp_path / "cache")))
    found.add(folder_of(text(tmp_path / "text", tokenizer="bytes", context=8).prepare(tmp_path / "cache")))
    (tmp_path / "text" / "000.txt").write_text("something else")
    found.add(folder_of(text(tmp_path / "text", vocab=300, context=8).prepare(tmp_path / "cache")))
    assert len(found) == 5


def _prepare(top: Path) -> None:
    text(top / "text", vocab=300, context=16).prepare(top / "cache")


def test_processes_that_prepare_at_once_end_with_one_cache(tmp_path: Path) -> None:
    stories(tmp_path / "text")
    processes = [multiprocessing.get_context("fork").Process(target=_prepare, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len([path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]) == 1


def test_a_held_out_source_of_its_own(tmp_path: Path) -> None:
    stories(tmp_path / "text", 10)
    (tmp_path / "apart.txt").write_text("the dog sees the cat\n" * 10)
    prepared = text(tmp_path / "text", tokenizer="bytes", context=8, held_out=tmp_path / "apart.txt").prepare(
        tmp_path / "cache"
    )
    assert token_file(prepared, "eval.bin").tolist() == [*(b"the dog sees the cat\n" * 10), 256]
    assert prepared.facts["documents"] == 10


def test_a_vocab_that_the_corpus_does_not_support_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab ab " * 100)
    with pytest.raises(DataError, match=r"vocab=5000 is more than this corpus supports: it gives 2\d\d different"):
        text(tmp_path / "a.txt", vocab=5000, context=8).prepare(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"context": 0}, "context=0"),
        ({"vocab": 256}, "vocab=256 .* at least 257"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": -0.1}, "held_out=-0.1"),
    ],
)
def test_settings_out_of_range_are_named(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        text("somewhere", **settings_)


def test_empty_and_short_corpora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"corpus '.*none' has no text"):
        text(tmp_path / "none").prepare(tmp_path / "cache")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match=r"short.txt' has 10 tokens, fewer than one window: context=64 needs 65"):
        text(tmp_path / "short.txt", tokenizer="bytes", context=64, held_out=0).prepare(tmp_path / "cache")
    (tmp_path / "some.txt").write_text("word " * 200)
    with pytest.raises(DataError, match=r"held-out part .* held_out to a larger share"):
        text(tmp_path / "some.txt", tokenizer="bytes", context=64).prepare(tmp_path / "cache")


def test_bad_tokenizer_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    with pytest.raises(DataError, match=r"tokenizer='.*none.json' cannot be read"):
        text(tmp_path / "a.txt", tokenizer=tmp_path / "none.json").prepare(tmp_path / "cache")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        text(tmp_path / "a.txt", tokenizer=tmp_path / "bad.json").prepare(tmp_path / "cache")


def naive_perplexities(train: list[int], held: list[int], vocab: int) -> tuple[float, float]:
    ones, twos = Counter(train), Counter(zip(train, train[1:], strict=False))

    def one(w: int) -> float:
        return (ones[w] + 1) / (len(train) + vocab)

    def two(v: int, w: int, m: float) -> float:
        return (twos[v, w] + m * one(w)) / (ones[v] + m)

    pairs = list(zip(held, held[1:], strict=False))
    unigram = math.exp(-sum(math.log(one(w)) for _, w in pairs) / len(pairs))
    bigram = min(
        math.exp(-sum(math.log(two(v, w, m)) for v, w in pairs) / len(pairs)) for m in (1, 10, 100, 1000, 10000)
    )
    return unigram, bigram


TOKENS = st.lists(st.integers(0, 19), min_size=2, max_size=80)


@examples(50)
@given(TOKENS, TOKENS, st.sampled_from([np.uint16, np.uint32]), st.integers(1, 7), st.booleans())
def test_table_perplexities_equal_the_formula(
    tmp_path_factory: pytest.TempPathFactory, train: list[int], held: list[int], dtype: Any, chunk: int, dense: bool
) -> None:
    from shardwise.data import perplexity

    top = tmp_path_factory.mktemp("tables")
    np.array(train, dtype=dtype).tofile(top / "train.bin")
    np.array(held, dtype=dtype).tofile(top / "eval.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "_CHUNK", chunk)  # pairs over the ends of chunks count too
        patch.setattr(perplexity, "_DENSE", 10**6 if dense else 0)
        found = table_perplexities(top / "train.bin", top / "eval.bin", dtype, 20)
    unigram, bigram = naive_perplexities(train, held, 20)
    assert found["unigram_perplexity"] == pytest.approx(unigram)
    assert found["bigram_perplexity"] == pytest.approx(bigram)


def test_a_long_held_out_part_is_represented_by_blocks_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.data import perplexity

    generator = np.random.default_rng(0)
    generator.integers(0, 50, 40_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    generator.integers(0, 50, 40_000, dtype=np.uint16).tofile(tmp_path / "eval.bin")
    whole = table_perplexities(tmp_path / "train.bin", tmp_path / "eval.bin", np.uint16, 50)
    monkeypatch.setattr(perplexity, "_HELD_OUT_LIMIT", 8192)
    monkeypatch.setattr(perplexity, "_BLOCK", 1024)
    part = table_perplexities(tmp_path / "train.bin", tmp_path / "eval.bin", np.uint16, 50)
    assert part["unigram_perplexity"] == pytest.approx(50, rel=0.01)
    assert part["bigram_perplexity"] == pytest.approx(whole["bigram_perplexity"], rel=0.01)
    assert part != whole


MEMORY = """
import json, resource, sys
from pathlib import Path
from shardwise.data.text import text
top = Path(sys.argv[1])
prepared = text(top / "large.txt", vocab=300, context=1024, tokenizer=sys.argv[2] or None).prepare(top / "cache")
for window in range(0, len(prepared.train), 1000):
    prepared.train._rows.read(range(window, min(window + 1000, len(prepared.train))))
assert "torch" not in sys.modules
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss begins with the peak of the process that started this one
    peak = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"tokens": prepared.facts["tokens"], "peak": peak}))
"""


def peak_of(top: Path, megabytes: int, tokenizer: str) -> int:
    """The most resident memory of a process that prepares a file of so many megabytes."""
    top.mkdir()
    line = (" ".join(WORDS * 3) + "\n").encode()
    with open(top / "large.txt", "wb") as file:
        for _ in range(megabytes):
            file.write(line * (1_000_000 // len(line)))
    command = [sys.executable, "-c", MEMORY, top, tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] > megabytes * 50_000
    return int(found["peak"])


@pytest.mark.parametrize(
    ("tokenizer", "megabytes"), [("bytes", 30), pytest.param("", 40, marks=pytest.mark.slow)], ids=["bytes", "bpe"]
)
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer: str, megabytes: int) -> None:
    small = peak_of(tmp_path / "small", megabytes // 10, tokenizer)
    large = peak_of(tmp_path / "large", megabytes, tokenizer)
    assert large < 300e6
    assert large - small < 50e6


CHARACTERS = st.one_of(
    st.sampled_from(list("ab'sdlr019 _-=<|>\n\t\r\f\x0b\x1c\x7f.")),
    st.sampled_from(
        ["\u00e9", "\u00a0", "\u0301", "\u2028", "\u00b2", "\u0969", "\U0001f600", "\ufeff", "<|end|>", "'ll"]
    ),
    st.characters(exclude_categories=["Cs"]),
)


@pytest.fixture(scope="module")
def trained() -> Any:
    texts = [" ".join(WORDS) + "\n\tself.x = 'it''s' 123  # \u00e9t\u00e9\n    return <|end|>\n"] * 3
    return tokens.train_bpe(iter(texts), 290)


@examples(300)
@given(st.lists(st.lists(CHARACTERS).map("".join), max_size=4))
def test_looking_words_up_equals_the_library_and_loses_nothing(trained: Any, texts: list[str]) -> None:
    by_word, by_library = WordEncoder(trained, np.uint16), LibraryEncoder(trained, np.uint16)
    found = [ids.tolist() for ids in by_word.encode(texts)]
    assert found == [ids.tolist() for ids in by_library.encode(texts)]
    assert found == [ids.tolist() for ids in by_word.encode(texts)]  # now from the store
    for text_, ids in zip(texts, found, strict=True):
        assert trained.decode(ids) == text_
        assert trained.token_to_id("<|end|>") not in ids


def test_the_store_of_words_is_bounded(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_KNOWN_BYTES", 2000)
    encoder = WordEncoder(trained, np.uint16)
    for number in range(200):
        encoder.encode([f"word{number} other{number}"])
        assert len(encoder._known) < 40
    assert encoder.encode(["word7"])[0].tolist() == trained.encode("word7").ids


def test_text_that_looks_like_the_end_token_ends_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before <|end|> after\n" * 20)
    made = text(stories(tmp_path / "text", 20), vocab=290, context=8).prepare(tmp_path / "cache")
    for tokenizer in ("bytes", made.facts["tokenizer"]):
        found = text(tmp_path / "a.txt", tokenizer=tokenizer, context=8, held_out=0).prepare(tmp_path / "cache")
        assert (token_file(found, "train.bin") == found.facts["end_token"]).sum() == 1


FULL = """
import resource, sys
from pathlib import Path
from shardwise.data.text import text
from shardwise.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    text(Path(sys.argv[1]) / "text", tokenizer="bytes", context=8).prepare(Path(sys.argv[1]) / "cache")
except DataError as error:
    print(error)
"""


def test_writing_that_stops_half_way_is_explained_and_leaves_nothing(tmp_path: Path) -> None:
    stories(tmp_path / "text")
    command = [sys.executable, "-c", FULL, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "disk that holds the data cache is full" in done.stdout
    assert "XDG_CACHE_HOME" in done.stdout
    assert not [path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]
    assert text(tmp_path / "text", tokenizer="bytes", context=8).prepare(tmp_path / "cache").facts["documents"] > 0
