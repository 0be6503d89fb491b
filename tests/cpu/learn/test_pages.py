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
MEASURED = re.compile(r"0[13]_\w+\.svg")  # pictures that differ from machine to machine
SMALL = {
    "01_splitting_input_data.md": ("STEPS=6", "SAMPLES=4096"),
    "02_the_parameter_server.md": ("STEPS=10",),
    "03_the_data_parallel_pipeline.md": ("STEPS=24", "EVERY=8"),
}
PAGES = sorted(path.name for path in LEARN.glob("[0-9]*.md"))
PICTURE = re.compile(r"!\[[^\]]+\]\(\.\./pictures/([\w.]+)\)")
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


def run_page(*told: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LEARN / "run.py"), *told]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@TWO_CORES
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path) -> None:
    done = run_page(str(LEARN / page), *SMALL.get(page, ()), "--into", str(tmp_path))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == set(PICTURE.findall((LEARN / page).read_text())), "pictures drawn, and pictures shown"
    same = [name for name in drawn if not MEASURED.fullmatch(name)]
    assert {name: drawn[name] for name in same} == {name: (KEPT / name).read_text() for name in same}


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
