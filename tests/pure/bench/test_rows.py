from __future__ import annotations

import json
import math
from pathlib import Path

from bench.rows import missing, number, other_cases, ratio, result, row, table, write


def test_a_row_has_the_fields_that_readers_rely_on() -> None:
    found = row("float32 batch=8", "shardwise", "step_time", "s", "lower", [3.0, 1.0, 2.0], target="<= 1.0 x ddp")
    assert found == {
        "case": "float32 batch=8",
        "system": "shardwise",
        "metric": "step_time",
        "unit": "s",
        "better": "lower",
        "values": [3.0, 1.0, 2.0],
        "median": 2.0,
        "target": "<= 1.0 x ddp",
    }


def test_a_missing_peer_is_a_row_with_the_command_that_installs_it() -> None:
    found = missing("float32 batch=8", "deepspeed", "step_time", "s", "lower", "pip install deepspeed")
    assert found["missing"] == "pip install deepspeed"
    assert found["values"] == []
    assert found["median"] is None


def test_a_ratio_row_names_its_base_and_has_an_interval() -> None:
    found = ratio("c", "shardwise", "ddp", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert found["metric"] == "ratio_to_ddp"
    assert found["values"] == [0.5, 1.0, 1.5]
    assert found["median"] == 1.0
    assert found["low"] <= 1.0 <= found["high"]
    assert "95% percentile bootstrap of the median" in found["interval"]


def test_a_ratio_without_a_finite_base_has_no_interval_and_no_values() -> None:
    found = ratio("c", "shardwise", "ddp", [1.0], [math.inf])
    assert found["values"] == []
    assert "low" not in found


def test_a_result_survives_the_file_infinite_values_included(tmp_path: Path) -> None:
    rows = [row("c", "ddp", "step_time", "s", "lower", [1.0, math.inf, math.inf], note="round 2: hung")]
    document = result("data_parallel", {"cpu": "x", "cores": 2}, rows, quick=True)
    write(tmp_path / "deep" / "r.json", document)
    read = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert read == document
    assert set(read) == {"bench", "quick", "machine", "rows"}
    assert read["rows"][0]["median"] == math.inf
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_the_table_shows_medians_intervals_hangs_and_what_is_missing() -> None:
    rows = [
        row("c", "shardwise", "step_time", "s", "lower", [0.5, 0.6, 0.7], target="<= 1.0 x ddp"),
        row("c", "ddp", "step_time", "s", "lower", [math.inf], note="round 1: hung"),
        missing("c", "ray-train", "step_time", "s", "lower", "pip install 'ray[train]'"),
        ratio("c", "shardwise", "ddp", [1.0, 1.0], [2.0, 2.0]),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split()[:4] == ["case", "system", "metric", "median"]
    assert lines[1].split() == ["c", "shardwise", "step_time", "0.6", "s", "0.5", "..", "0.7", "<=", "1.0", "x", "ddp"]
    assert lines[2].split() == ["c", "ddp", "step_time", "inf", "s", "round", "1:", "hung"]
    assert lines[3].endswith("pip install 'ray[train]'")
    assert "0.5 x" in lines[4]


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0.123456, 12345678.9, math.inf, None)] == ["0.1235", "12,345,679", "inf", "-"]


def test_cases_that_are_run_alone_leave_the_others_of_the_file(tmp_path: Path) -> None:
    machine = {"cpu": "a", "load_average": 0.1}
    old = [row(case, "ours", "step_time", "s", "lower", [1.0]) for case in ("one", "two")]
    write(tmp_path / "r.json", result("b", machine, old, quick=False))
    new = [row("two", "ours", "step_time", "s", "lower", [2.0])]
    assert other_cases(tmp_path / "r.json", new, {**machine, "load_average": 3.0}) == old[:1]
    assert other_cases(tmp_path / "r.json", new, {**machine, "cpu": "b"}) == []
    assert other_cases(tmp_path / "none.json", new, machine) == []
