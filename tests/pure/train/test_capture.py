"""Finding a job in a file without running it, binding its parameters, keeping its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import JobError
from shardwise.train import capture


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "my_job.py"
    file.write_text(text)
    return str(file)


def test_a_function_called_job_is_the_job(tmp_path: Path) -> None:
    found = capture.find_job(write(tmp_path, "def other(): ...\ndef job(lr: float = 1): ...\n"))
    assert found == capture.JobSource(folder=str(tmp_path), path="my_job.py", function="job")


def test_the_only_function_that_returns_a_train_job_is_the_job(tmp_path: Path) -> None:
    found = capture.find_job(write(tmp_path, "import shardwise as sw\ndef mine() -> sw.TrainJob: ...\ndef x(): ...\n"))
    assert found is not None
    assert found.function == "mine"


def test_a_file_is_not_run_to_be_looked_at(tmp_path: Path) -> None:
    assert capture.find_job(write(tmp_path, "raise SystemExit(3)\n")) is None


def test_a_function_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "def a() -> TrainJob: ...\ndef b() -> TrainJob: ...\n")
    found = capture.find_job(f"{path}:b")
    assert found is not None
    assert found.function == "b"
    with pytest.raises(JobError, match="several jobs: a, b"):
        capture.find_job(path)
    with pytest.raises(JobError, match="did you mean 'b'"):
        capture.find_job(f"{path}:bb")


def test_a_missing_file_and_a_syntax_error_say_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no job file"):
        capture.find_job(str(tmp_path / "none.py"))
    with pytest.raises(JobError, match=r"my_job\.py:2: "):
        capture.find_job(write(tmp_path, "x = 1\ndef job(:\n"))
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="not UTF-8"):
        capture.find_job(str(tmp_path / "binary.py"))


def job(lr: float = 1e-3, layers: int = 2, name: str = "a", wide: bool = False, limit: int | None = None) -> Any:
    return lr, layers, name, wide, limit


def test_strings_become_the_annotated_types() -> None:
    sets = capture.parse_sets(["lr=3e-4", "layers=6", "wide=true", "limit=none", "name=x=y"])
    assert capture.bind(job, sets) == {"lr": 3e-4, "layers": 6, "name": "x=y", "wide": True, "limit": None}


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["laers=3"], "did you mean 'layers'?"),
        (["layers=many"], "'many' is not one"),
        (["layers"], "has no value"),
    ],
)
def test_a_bad_set_names_the_parameter(sets: list[str], says: str) -> None:
    with pytest.raises(JobError) as caught:
        capture.bind(job, capture.parse_sets(sets))
    assert says in str(caught.value)


def test_a_parameter_without_default_must_be_given() -> None:
    def needs(width: int) -> None: ...

    with pytest.raises(JobError, match="--set width=VALUE"):
        capture.bind(needs, {})
    assert capture.bind(needs, {"width": "3"}) == {"width": 3}


def test_the_digest_changes_with_any_source() -> None:
    one = capture.digest({"a.py": "x = 1", "b.py": ""})
    assert one == capture.digest({"b.py": "", "a.py": "x = 1"})
    assert one != capture.digest({"a.py": "x = 2", "b.py": ""})
    assert one != capture.digest({"a.py": "x = 1", "c.py": ""})
