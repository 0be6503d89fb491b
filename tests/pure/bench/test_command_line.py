from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine
from bench.__main__ import BENCHMARKS, main
from bench.options import Options
from bench.rounds import Lost
from bench.rows import Row


def test_the_benchmarks_are_listed_one_a_line_without_torch() -> None:
    code = "import sys, bench.__main__ as m; m.main([]); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert [line.split()[0] for line in found.stdout.splitlines()] == list(BENCHMARKS)


def test_every_benchmark_imports_without_torch() -> None:
    each = "\n".join(f"import bench.{name}; bench.{name}.run" for name in BENCHMARKS)
    code = f"import sys\n{each}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data_paralel"])
    assert stop.value.code == 2
    assert "data_parallel" in capsys.readouterr().err


def test_machine_and_load_come_first_and_the_json_holds_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import startup
    from bench.rows import row

    monkeypatch.setattr(startup, "run", lambda options: [row("c", "bare", "seconds", "s", "lower", [1.0])])
    assert main(["startup", "--quick", "--json", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out.startswith("load average ")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["bench"] == "startup"
    assert document["quick"] is True
    assert set(document["machine"]) == {"cpu", "cores", "memory_bytes", "torch", "device", "load_average"}


def test_what_was_measured_before_an_interruption_is_kept_beside_other_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import startup
    from bench.rows import row

    file = tmp_path / "r.json"
    one, two, three = (row(case, "bare", "seconds", "s", "lower", [1.0]) for case in ("one", "two", "three"))

    def interrupted(options: Options) -> list[Row]:
        options.keep([two])
        options.keep([two, three])
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "describe", lambda: {"torch": "2", "load_average": 1.0, "cpu": "X", "device": None})
    monkeypatch.setattr(machine, "in_words", str)
    monkeypatch.setattr(startup, "run", lambda options: [one, two | {"median": 9.0}])
    assert main(["startup", "--json", str(file)]) == 0
    monkeypatch.setattr(startup, "run", interrupted)
    assert main(["startup", "--json", str(file)]) == 130
    assert json.loads(file.read_text())["rows"] == [one, two, three]
    monkeypatch.setattr(machine, "describe", lambda: {"torch": "3", "load_average": 1.0, "cpu": "X", "device": None})
    monkeypatch.setattr(startup, "run", interrupted)
    assert main(["startup", "--json", str(file)]) == 130
    assert json.loads(file.read_text())["machine"]["torch"] == "2"  # the whole result of another machine


def test_a_benchmark_that_cannot_run_at_all_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import startup

    def lost(options: object) -> list[object]:
        raise Lost("ended with status 1; no corpus")

    monkeypatch.setattr(startup, "run", lost)
    assert main(["startup"]) == 1
    assert capsys.readouterr().err == "bench startup could not run: ended with status 1; no corpus\n"


def test_the_machine_is_described(tmp_path: Path) -> None:
    about = machine.describe()
    assert about["cores"] >= 1
    assert about["memory_bytes"] > 2**28
    assert about["cpu"]
    assert about["load_average"] >= 0
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: EPYC 9: fast\n\n")
    assert machine.cpu_model(tmp_path / "cpuinfo") == "EPYC 9: fast"
    assert machine.cpu_model(tmp_path / "none")
    assert machine.version("no-such-package") is None
    words = machine.in_words(
        {**about, "cpu": "X", "cores": 2, "memory_bytes": 2**35, "device": "H100", "load_average": 3}
    )
    assert words.startswith("load average 3; X, 2 cores, 32 GiB, H100, torch ")
