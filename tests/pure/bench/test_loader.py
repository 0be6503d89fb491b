from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from bench import corpus
from bench.launched import Launched
from bench.loader import finish, resident_bytes, waiting
from bench.rounds import Lost
from bench.texts import Texts

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_corpus_has_its_size_and_is_lines_of_words(tmp_path: Path) -> None:
    corpus.write(tmp_path / "a", 300_000, words=500)
    corpus.write(tmp_path / "b", 300_000, words=500)
    text = (tmp_path / "a").read_bytes()
    assert len(text) == 300_000
    assert text == (tmp_path / "b").read_bytes()
    lines = text.split(b"\n")[1:-1]
    assert len(lines) > 1000
    assert all(1 <= len(line.split()) <= 24 for line in lines)
    words = {word for line in lines for word in line.split()}
    assert 100 < len(words) <= 1200


def test_a_large_corpus_repeats_lines_in_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 50_000)
    corpus.write(tmp_path / "a", 420_000, words=500)
    text = (tmp_path / "a").read_bytes()
    assert len(text) == 420_000
    assert text[200_000:250_000] != text[:50_000]  # the block after the last fresh one begins elsewhere


@linux
def test_the_peak_is_that_of_all_processes_of_a_command(tmp_path: Path) -> None:
    grow = "import os, time; p = os.fork(); b = b'x' * 60_000_000; time.sleep(0.4); p and os.waitpid(p, 0)"
    peak = finish(Launched([sys.executable, "-c", grow], env={}, folder=tmp_path), 20.0)
    assert 120e6 < peak < 250e6


def test_a_command_that_fails_or_hangs_has_no_peak(tmp_path: Path) -> None:
    with pytest.raises(Lost, match="ended with status 4; no corpus"):
        finish(
            Launched([sys.executable, "-c", "print('no corpus'); raise SystemExit(4)"], env={}, folder=tmp_path), 9.0
        )
    with pytest.raises(Lost, match="hung: no end within 0 s"):
        finish(Launched([sys.executable, "-c", "import time; time.sleep(60)"], env={}, folder=tmp_path), 0.3)
    assert resident_bytes(2**22 + 1) == 0


def test_the_waiting_share_is_read_from_a_runs_events(tmp_path: Path) -> None:
    steps = [(0.9, 1.0), (0.01, 1.0), (0.03, 3.0)]
    events = [{"event": "run_started"}] + [{"event": "step", "wait_s": w, "seconds": s} for w, s in steps]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = waiting(tmp_path)
    assert found["metric"] == "waiting_share"
    assert found["values"][0] == pytest.approx(0.01)
    assert math.isfinite(found["median"])


def test_without_a_run_the_row_says_which_command_makes_one(tmp_path: Path) -> None:
    assert waiting(tmp_path)["missing"] == "shardwise train recipes/python_stdlib.py"


def test_the_settings_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(folder="/x", workers=2, batched=True)
    for name, value in texts.environment().items():
        monkeypatch.setenv(name, value)
    assert Texts.from_environment() == texts
