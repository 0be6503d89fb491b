"""Every verb from its command line: what it hands to the function it calls, what it prints, how it exits."""

from __future__ import annotations

import ast
import errno
import json
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardwise.train
from shardwise.cli import main as command
from shardwise.cli.app import VERBS
from shardwise.cli.console import aligned
from shardwise.cli.main import run
from shardwise.cli.new import TEMPLATES
from shardwise.errors import JobError, RunError
from shardwise.observe.summary import read
from shardwise.spec.cluster import Calibration, Cluster, Device, Link, Node, Pair
from tests.pure.observe.story import Story


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    story = Story().start(steps=2).step(1, 5.0).step(2, 4.0).tell("run_finished", step=2, status="finished")
    story.write(tmp_path / "runs" / "20250101-gpt")
    return tmp_path / "runs"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for `shardwise.train.api` that keeps its calls; each verb returns what `answers` holds for it."""
    module = types.ModuleType("shardwise.train.api")
    module.calls, module.answers = {}, {}  # type: ignore[attr-defined]

    def verb(name: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            module.calls[name] = (args, kwargs)  # type: ignore[attr-defined]
            answer = module.answers.get(name)  # type: ignore[attr-defined]
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return called

    for name in ("plan", "train", "sample", "evaluate", "export"):
        setattr(module, name, verb(name))
    monkeypatch.setitem(sys.modules, "shardwise.train.api", module)
    monkeypatch.setattr(shardwise.train, "api", module, raising=False)
    return module


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb.__name__} " in text for verb in VERBS)
    assert "..." not in text.split("Commands:")[1]  # no line was cut off
    assert run([]) == 0
    assert capsys.readouterr().out == text


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shardwise {shardwise.__version__}\n"


def test_an_unknown_verb_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_an_error_of_the_user_is_one_paragraph_with_its_exit_code(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["train"] = JobError("there is no job file nope.py. Write one.")
    assert run(["train", "nope.py"]) == JobError.exit_code
    captured = capsys.readouterr()
    assert captured.err == "shardwise: there is no job file nope.py. Write one.\n"
    assert captured.out == ""


def test_ctrl_c_exits_with_130(api: Any) -> None:
    api.answers["train"] = KeyboardInterrupt()
    assert run(["train", "job.py"]) == 130


def test_a_full_disk_is_the_users_to_solve(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["train"] = OSError(errno.ENOSPC, "No space left on device", "runs/x")
    assert run(["train", "job.py"]) == RunError.exit_code
    assert "the disk that holds runs/x is full. Free some space" in capsys.readouterr().err


def test_our_own_mistakes_keep_their_traceback(api: Any) -> None:
    api.answers["train"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        run(["train", "job.py"])


def test_train_hands_everything_on_and_sums_up(api: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "20250101-gpt"
    api.answers["train"] = types.SimpleNamespace(path=folder, summary=read(folder), exit_code=143)
    words = "train job.py --set lr=3e-4 --set layers=2 --plan data=2,sync.bucket_bytes=9 --resume latest --name x"
    assert run([*words.split(), "--runs", str(runs), "--", "--flag", "1"]) == 143
    assert api.calls["train"] == (
        ("job.py",),
        {
            "sets": ["lr=3e-4", "layers=2"],
            "plan": "data=2,sync.bucket_bytes=9",
            "cluster": None,
            "on": "local",
            "resume": "latest",
            "runs": runs,
            "name": "x",
            "display": True,
            "args": ["--flag", "1"],
        },
    )
    text = capsys.readouterr().out
    assert "loss        5.000 at first, 4.000 at step 2" in text
    assert text.endswith(f"shardwise show {folder}\n")


def test_quiet_training_prints_nothing(api: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "20250101-gpt"
    api.answers["train"] = types.SimpleNamespace(path=folder, summary=read(folder), exit_code=0)
    assert run(["train", "job.py", "-q"]) == 0
    assert api.calls["train"][1]["display"] is False
    assert capsys.readouterr().out == ""


def test_plan_prints_the_report(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["plan"] = types.SimpleNamespace(text=lambda: "plan      data=2")
    assert run(["plan", "job.py:tiny", "--set", "a=1", "--cluster", "c.toml"]) == 0
    assert api.calls["plan"] == (("job.py:tiny",), {"sets": ["a=1"], "plan": None, "cluster": "c.toml"})
    assert capsys.readouterr().out == "plan      data=2\n"


def test_cluster_calibrate_draws_tables_and_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    link = Link(latency_s=2e-5, bandwidth=2.0**30, measured=True)
    pairs = (Pair(source=0, target=1, link=link), Pair(source=1, target=0, link=link))
    measured = Calibration(backend="gloo", ranks=2, pairs=pairs, collectives={"all_reduce": ((1024, 1e-3),)})
    node = Node(devices=(Device(kind="cpu", memory_bytes=1),), link=link)
    found = types.SimpleNamespace(
        cluster=Cluster(nodes=(node,), calibrations=(measured,)), seconds=7.0, written=[Path("links.json")]
    )
    module: Any = types.ModuleType("shardwise.train.calibrate")
    calls: list[dict[str, Any]] = []

    def calibrate(**told: Any) -> Any:
        calls.append(told)
        return found if told["ranks"] else None

    module.calibrate = calibrate
    monkeypatch.setitem(sys.modules, "shardwise.train.calibrate", module)
    monkeypatch.setattr(shardwise.train, "calibrate", module, raising=False)
    assert run(["cluster", "calibrate", "--ranks", "2", "--on", "local", "--out", "c.json"]) == 0
    assert capsys.readouterr().out == (
        "measured    2 ranks on 1 host over gloo, in 7.0 s\n\n"
        "latency, from a rank to another\n        to 0   to 1\nrank 0  -      20 us\nrank 1  20 us  -\n\n"
        "bandwidth, from a rank to another\n        to 0       to 1\nrank 0  -          1.0 GiB/s\n"
        "rank 1  1.0 GiB/s  -\n\n"
        "collectives, by the bytes of the whole tensor\n            1.0 KiB\nall_reduce  1.0 ms\n\n"
        "saved       links.json\n            plan and train on this machine use it\n"
    )
    assert run(["cluster", "calibrate", "--on", "env"]) == 0
    assert capsys.readouterr().out == "", "a rank but the first of another launcher says nothing"
    assert calls == [{"ranks": 2, "on": "local", "out": Path("c.json")}, {"ranks": None, "on": "env", "out": None}]


def test_show_prints_the_summary_and_writes_the_report(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "--runs", str(runs)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("run         r   finished, 2 steps")
    assert f"report      {runs / '20250101-gpt' / 'report.html'}" in text
    assert "</svg>" in (runs / "20250101-gpt" / "report.html").read_text()


def test_show_as_json_is_json(runs: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["show", "20250101-gpt", "--runs", str(runs), "--json"]) == 0
    sys.stdout.flush()
    found = json.loads(capfdbinary.readouterr().out)
    assert (found["step"], found["loss"]["best"]) == (2, 4.0)


def test_show_of_an_unwritable_folder_still_sums_up(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("shardwise.observe.report.write_whole", refuse)
    assert run(["show", "--runs", str(runs)]) == RunError.exit_code
    captured = capsys.readouterr()
    assert "5.000 at first" in captured.out
    assert "report.html: Read-only file system. Make the run folder writable" in captured.err


def test_runs_are_listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Story(2000.0).start().write(runs / "20250102-gpt")
    assert run(["runs", "--runs", str(runs), "-n", "1"]) == 0
    head, line, more = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "status"]
    assert line.split()[:2] == ["20250102-gpt", "running"]
    assert more.startswith("and 1 older")
    assert run(["runs", "--runs", str(runs / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_a_sample_is_the_prompt_and_its_continuation(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["sample"] = iter([" f(", "x)"])
    assert run(["sample", "latest", "def", "--tokens", "9", "--temperature", "0", "--top-k", "0", "--seed", "3"]) == 0
    told = {"tokens": 9, "temperature": 0.0, "top_k": 0, "seed": 3, "checkpoint": "latest", "runs": Path("runs")}
    assert api.calls["sample"] == (("latest", "def"), told)
    assert capsys.readouterr().out == "def f(x)\n"


def test_evaluate_prints_each_metric(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["evaluate"] = {"loss": 2.5, "accuracy": 0.75}
    assert run(["evaluate", "r", "--checkpoint", "best"]) == 0
    assert api.calls["evaluate"] == (("r",), {"checkpoint": "best", "runs": Path("runs")})
    assert capsys.readouterr().out.splitlines() == ["metric    value", "loss      2.5", "accuracy  0.75"]


def test_export_writes_into_the_run_by_default(api: Any, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["export"] = Path("there")
    assert run(["export", "latest", "--to", "dcp", "--runs", str(runs)]) == 0
    folder = runs / "20250101-gpt"
    assert api.calls["export"][1]["out"] == folder / "export" / "dcp"
    assert capsys.readouterr().out == "there\n"
    assert run(["export", "latest", "--to", "safetensor", "--runs", str(runs)]) == 2
    assert "did you mean 'safetensors'?" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["text", "image", "finetune", "script"])
def test_new_writes_a_job_that_compiles_and_uses_names_that_exist(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new", "mine", "--from", template]) == 0
    assert "shardwise train mine.py" in capsys.readouterr().out
    text = (tmp_path / "mine.py").read_text()
    assert "FILE_NAME" not in text
    tree = ast.parse(text)
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sw"
    }
    assert names
    assert names <= set(shardwise.__all__)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert ("job" in functions) == (template != "script")


def test_new_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("kept")
    assert run(["new", "mine"]) == RunError.exit_code
    assert "mine.py is there already" in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mine", "--from", "txt"], "did you mean 'text'?"),
        (["my-job"], "'my-job' cannot be imported by Python"),
        (["nowhere/mine"], "cannot write nowhere/mine.py"),
    ],
)
def test_new_refuses_what_it_cannot_write(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new", *words]) != 0
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_template_is_offered() -> None:
    assert {path.name for path in TEMPLATES.iterdir()} == {
        f"{name}.py.txt" for name in ("text", "image", "finetune", "script")
    }


def test_doctor_exits_with_1_if_something_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"gloo": False, "nccl": False}
    monkeypatch.setattr("shardwise.observe.doctor.probe_torch", lambda: answers)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(["doctor", "--runs", str(tmp_path / "runs")]) == 1
    assert "missing  backends" in capsys.readouterr().out
    answers["gloo"] = True
    assert run(["doctor", "--runs", str(tmp_path / "runs")]) == 0
    assert "everything needed is here" in capsys.readouterr().out


def test_train_starts_its_processes_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    start = types.ModuleType("shardwise.train.start")
    start.early = order.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shardwise.train.start", start)
    monkeypatch.setattr(command, "run", lambda words: order.append("run") or 7)
    for words, expected in (
        (["train", "x.py"], [["train", "x.py"], "run"]),
        (["train", "--help"], ["run"]),
        (["show"], ["run"]),
    ):
        order.clear()
        with pytest.raises(SystemExit) as end:
            command.main(words)
        assert (end.value.code, order) == (7, expected)


def test_columns_are_aligned_and_lines_end_where_their_text_does() -> None:
    assert aligned([("a", "bb", "c"), ("aaa", "b", "")]) == ["a    bb  c", "aaa  b"]


def test_help_is_quick_and_imports_neither_torch_nor_rich() -> None:
    code = (
        "import sys\nfrom shardwise.cli.main import run\nassert run(['--help']) == 0\n"
        "assert not {'torch', 'rich', 'numpy'} & set(sys.modules)"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3  # of a processor, so that a busy machine does not count


def test_the_module_runs_as_a_command() -> None:
    words = [sys.executable, "-m", "shardwise.cli.main", "show", "nope", "--runs", "/nonexistent"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (RunError.exit_code, "")
    assert done.stderr.startswith("shardwise: there is no run 'nope'")
    assert "Traceback" not in done.stderr
