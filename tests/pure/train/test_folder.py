"""The run folder: private, never reused, and a changed job is refused with a diff."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shardwise.errors import RunError
from shardwise.train.capture import JobSource
from shardwise.train.folder import RunFolder

SOURCE = JobSource(folder="/somewhere", path="job.py", function="job")


def test_every_run_is_new_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    first, second = (RunFolder.create(tmp_path / "runs", name="job") for _ in range(2))
    first.publish()
    second.publish()
    assert first.path != second.path
    assert (tmp_path / "runs" / "latest").resolve() == second.path.resolve()
    assert stat.S_IMODE(first.path.stat().st_mode) == 0o700


def test_the_job_is_kept_and_read_back(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, name="job")
    run.write_job(SOURCE, {"lr": 0.1, "shape": (1, 2)}, {"job.py": "text", "part/other.py": "more"})
    assert (run.code / "part" / "other.py").read_text() == "more"
    assert run.source() == JobSource(folder=str(run.code.resolve()), path="job.py", function="job")
    record = run.record()
    assert record.parameters == {"lr": 0.1, "shape": [1, 2]}
    assert record.versions["torch"][0].isdigit()
    run.refuse_changed_job({"job.py": "text", "part/other.py": "more"}, {"lr": 0.1, "shape": (1, 2)})


def test_a_changed_source_or_parameter_is_refused_with_a_diff(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, name="job")
    run.write_job(SOURCE, {"lr": 0.1}, {"job.py": "a\nb\n"})
    with pytest.raises(RunError) as caught:
        run.refuse_changed_job({"job.py": "a\nc\n"}, {"lr": 0.1})
    assert "-b" in str(caught.value)
    assert "+c" in str(caught.value)
    with pytest.raises(RunError) as caught:
        run.refuse_changed_job({"job.py": "a\nb\n"}, {"lr": 0.2})
    assert "-lr = 0.1" in str(caught.value)
    assert "+lr = 0.2" in str(caught.value)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--runs DIR"):
        RunFolder.create(tmp_path / "file" / "runs", name="job")


def test_a_folder_without_a_job_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder(tmp_path).record()


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, name="job")

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        run.write_job(SOURCE, {}, {"job.py": ""})
