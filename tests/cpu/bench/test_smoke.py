"""Each benchmark runs: `--quick` end to end, with the real systems."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from bench.netns import unavailable

MARK = f"SHARDWISE_SMOKE={uuid.uuid4().hex}"
ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 60.0  # of a quick run on a quiet machine
pytestmark = pytest.mark.slow


def quick(name: str, tmp_path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    out = tmp_path / "result.json"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, "--quick", "--json", str(out)],
        cwd=ROOT,
        env=os.environ | dict([MARK.split("=")]),
        capture_output=True,
        text=True,
        timeout=400,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("load average ")
    document = json.loads(out.read_text())
    assert document["bench"] == name
    assert document["quick"] is True
    calm = document["machine"]["load_average"] < document["machine"]["cores"] / 2
    assert seconds < LIMIT_S or not calm, f"{seconds:.0f} s"
    return {(row["case"], row["system"], row["metric"]): row for row in document["rows"]}


def assert_measured(rows: dict[tuple[str, str, str], dict[str, Any]], rounds: int = 3) -> None:
    for key, row in rows.items():
        assert "note" not in row, (key, row.get("note"))
        assert len(row["values"]) == rounds, key
        assert all(math.isfinite(value) and value > 0 for value in row["values"]), key
        assert min(row["values"]) <= row["median"] <= max(row["values"]), key


def test_data_parallel(tmp_path: Path) -> None:
    rows = quick("data_parallel", tmp_path)
    case = "bfloat16 batch=2"
    times = {(case, system, "step_time") for system in ("shardwise", "ddp", "barrier")}
    ratios = {("shardwise", "ratio_to_ddp"), ("shardwise", "ratio_to_barrier"), ("barrier", "ratio_to_ddp")}
    assert set(rows) == times | {(case, *ratio) for ratio in ratios}
    assert_measured(rows)
    ours = rows[case, "shardwise", "step_time"]
    assert ours["agrees"] is True
    assert ours["last_loss"] < ours["first_loss"] - 0.5
    assert "agrees" not in rows[case, "barrier", "step_time"]
    for base in ("ddp", "barrier"):
        ratio = rows[case, "shardwise", f"ratio_to_{base}"]
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert not left_over()


def test_startup(tmp_path: Path) -> None:
    rows = quick("startup", tmp_path)
    systems = {(case, system) for case, system, metric in rows if metric == "seconds"}
    assert systems == {
        ("train to step 1, 2 ranks", "shardwise"),
        ("train to step 1, 2 ranks", "bare"),
        ("--help", "shardwise"),
    }
    assert_measured(rows)
    assert not left_over()


def test_loader(tmp_path: Path) -> None:
    rows = quick("loader", tmp_path)
    rates = [row for row in rows.values() if row["metric"] == "tokens_per_s"]
    assert [row["system"] for row in rates] == ["shardwise", "torch"]
    assert_measured(rows)
    assert all(row["agrees"] is True for row in rates)
    assert rates[0]["checksum"] == rates[1]["checksum"] > 0
    assert not left_over()


def left_over() -> list[str]:
    """Processes of these benchmarks that outlived them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if MARK.encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_collectives(tmp_path: Path) -> None:
    rows = quick("collectives", tmp_path)
    case = "all_reduce 1 MB 2 ranks"
    assert set(rows) == {(case, "shardwise", "time"), (case, "gloo", "time"), (case, "shardwise", "ratio_to_gloo")}
    assert_measured(rows)


def test_slow_link(tmp_path: Path) -> None:
    why = unavailable()
    rows = quick("slow_link", tmp_path)
    case = "100 Mbit"
    systems = ("shardwise", "ddp", "unsynchronised")
    if why is not None:
        assert set(rows) == {(case, system, "tokens_per_s") for system in systems}
        assert all(row["missing"] == why for row in rows.values())
        return
    wire = rows[case, "limit", "bandwidth"]
    assert 85 < wire["median"] < 102
    assert "ms round trip" in wire["note"]
    for system in systems:
        assert min(rows[case, system, "tokens_per_s"]["values"]) > 0
    assert rows[case, "shardwise", "loss_at_equal_samples"]["agrees"] is True
    assert rows[case, "ddp", "loss_at_equal_samples"]["median"] < 4.0
    assert rows[case, "ddp", "waiting_share"]["median"] > 0.8
    assert 10 < rows[case, "ddp", "time_to_loss"]["median"] < 100
    assert not left_over()


def test_param_server(tmp_path: Path) -> None:
    rows = quick("param_server", tmp_path)
    level, slow = "float32 batch=2", "1 of 3 workers slowed 4 x"
    sync, stale = "param_server:sync", "param_server:stale"
    equal = {key: row for key, row in rows.items() if key[0] == level and key[2] != "loss"}
    assert set(equal) == {
        (level, "all_reduce", "step_time"),
        (level, sync, "step_time"),
        (level, sync, "ratio_to_all_reduce"),
    }
    assert_measured(equal)
    assert rows[level, sync, "step_time"]["agrees"] is True
    assert rows[level, sync, "loss"]["median"] == pytest.approx(rows[level, "all_reduce", "loss"]["median"], abs=1e-3)
    assert {key[1:] for key in rows if key[0] == slow} == {
        *((system, metric) for system in (stale, "alone") for metric in ("fast_worker", "steps", "held_out_loss")),
        (stale, "ratio_to_alone"),
    }
    assert rows[slow, stale, "ratio_to_alone"]["median"] > 0.5, "at the slow worker's pace it would be 0.25"
    assert rows[slow, stale, "held_out_loss"]["median"] < 4.0  # log(64) = 4.16 is what knowing nothing costs
    assert not left_over()


def test_pipeline(tmp_path: Path) -> None:
    rows = quick("pipeline", tmp_path)
    assert rows["bubble on 2 ranks", "1f1b", "bubble_of_the_order"]["median"] == pytest.approx(1 / 9)
    assert rows["bubble on 2 ranks", "1f1b", "ratio_to_the_order_as_asked"]["median"] >= 1.0
    assert 0.9 < rows["bubble on 2 ranks", "1f1b", "ratio_to_the_order"]["median"] < 1.5
    case = next(case for case, system, _ in rows if system == "torch:1f1b")
    ours, torchs = (rows[case, system, "step_time"] for system in ("shardwise:1f1b", "torch:1f1b"))
    assert ours["first_losses"] == pytest.approx(torchs["first_losses"], rel=1e-3), "the same work"


def test_memory(tmp_path: Path) -> None:
    rows = quick("memory", tmp_path)
    assert_measured(rows, rounds=1)
    case = "GPT of 4 M parameters"
    full, plain = (rows[case, system, "peak_bytes"]["median"] for system in ("shardwise:recompute=full", "shardwise"))
    assert full < plain


def test_tensor(tmp_path: Path) -> None:
    rows = quick("tensor", tmp_path)
    assert_measured(rows, rounds=3)
    case = "64 tokens a step, width 512, 2 ranks"
    times = [rows[case, system, "step_time"]["median"] for system in ("shardwise", "dtensor")]
    assert rows[case, "shardwise", "ratio_to_dtensor"]["median"] == pytest.approx(times[0] / times[1], rel=0.5)
