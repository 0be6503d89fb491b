"""Every page of docs/learn runs from its first block to its last, at a small size, and draws the pictures it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LEARN = ROOT / "docs" / "learn"
KEPT = ROOT / "docs" / "pictures"
MEASURED = re.compile(r"0[135679]_\w+\.svg")  # pictures that differ from machine to machine
SMALL = {
    "01_splitting_input_data.md": ("STEPS=6", "SAMPLES=4096"),
    "02_the_parameter_server.md": ("STEPS=3",),
    "03_the_data_parallel_pipeline.md": ("STEPS=24", "EVERY=8"),
    "05_why_the_model_is_split.md": ("WIDTH=128", "SAMPLES=8"),
    "06_pipeline_and_layer_split.md": ("STEPS=4",),
    "07_training_and_serving_in_stages.md": ("STEPS=4",),
    "09_data_and_model_parallelism.md": ("STEPS=4",),
}
TOLD = (
    "02_the_parameter_server.md",
    "04_collectives.md",
    "05_why_the_model_is_split.md",
    "06_pipeline_and_layer_split.md",
    "07_training_and_serving_in_stages.md",
    "09_data_and_model_parallelism.md",
)  # pages that print what they show, but for measured numbers
PAGES = sorted(path.name for path in LEARN.glob("[0-9]*.md"))
PICTURE = re.compile(r"!\[[^\]]+\]\(\.\./pictures/([\w.]+)\)")
TEXT = re.compile(r"^```text( measured)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r" *\d+(\.\d+)?")
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


def run_page(*told: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LEARN / "run.py"), *told]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def compared(text: str, measured: bool) -> str:
    """What must be alike in a page's text and its output: of what was measured everything but the numbers."""
    return NUMBER.sub(" #", text) if measured else text


@TWO_CORES
@pytest.mark.parametrize(
    "page", [page if page == "04_collectives.md" else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_a_page_runs(page: str, tmp_path: Path) -> None:
    done = run_page(str(LEARN / page), *SMALL.get(page, ()), "--into", str(tmp_path))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == set(PICTURE.findall((LEARN / page).read_text())), "pictures drawn, and pictures shown"
    same = [name for name in drawn if not MEASURED.fullmatch(name)]
    assert {name: drawn[name] for name in same} == {name: (KEPT / name).read_text() for name in same}
    if page in TOLD:
        assert_printed(done.stdout, (LEARN / page).read_text())


def assert_printed(output: str, page: str) -> None:
    """The output, block by block, is what the page shows."""
    shown = [(bool(match[1]), match[2]) for match in TEXT.finditer(page)]
    lines = output.splitlines(keepends=True)[:-2]  # the last say how long it took
    for measured, text in shown:
        count = text.count("\n")
        assert compared("".join(lines[:count]), measured) == compared(text, measured)
        del lines[:count]
    assert not lines, "something was printed that the page does not show"


def test_a_text_that_is_not_what_was_printed_is_noticed() -> None:
    page = "```text\nsum 3\n```\n\n```text measured\n  12 steps in 0.31 s\n```\n"
    assert_printed("sum 3\n 3 steps in 12.5 s\n\npage.md: 1 s\n", page)
    for wrong in ("sum 4\n 3 steps in 12.5 s\n", "sum 3\n 3 clocks in 12.5 s\n", "sum 3\n 3 steps in 1 s\nmore\n"):
        with pytest.raises(AssertionError):
            assert_printed(f"{wrong}\npage.md: 1 s\n", page)


@pytest.mark.parametrize("page", PAGES)
def test_the_pictures_of_a_page_are_kept(page: str) -> None:
    shown = PICTURE.findall((LEARN / page).read_text())
    assert shown, "a page has a picture"
    for name in shown:
        assert xml.parse(KEPT / name).getroot().tag.endswith("svg")


def test_no_picture_is_kept_that_nothing_shows() -> None:
    shown = {name for page in PAGES for name in PICTURE.findall((LEARN / page).read_text())}
    numbered = {path.name for path in KEPT.glob("[0-9]*.svg")}
    assert numbered == shown


def test_the_index_names_every_page() -> None:
    assert set(re.findall(r"\]\((\d\d_\w+\.md)\)", (LEARN / "README.md").read_text())) == set(PAGES)


def test_a_size_that_no_block_has_is_refused() -> None:
    done = run_page("01", "STEPZ=3")
    assert done.returncode == 1
    assert "no block of the page has a line 'STEPZ = ...'" in done.stderr


def test_an_error_in_a_block_has_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\ntext\n\n```python\ny = 2\nx / 0\n```\n")
    done = run_page(str(page))
    assert done.returncode == 1
    assert f'{page}", line 11' in done.stderr
    assert "ZeroDivisionError" in done.stderr
