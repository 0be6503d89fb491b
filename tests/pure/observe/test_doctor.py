"""The doctor's findings for machines that this one is not."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import pytest

from shardwise.observe import doctor
from shardwise.observe.doctor import Finding, examine, healthy

GOOD = {"torch": "2.13.0", "gloo": True, "nccl": False, "gpus": [], "built_for": ""}


def found(tmp_path: Path, probe: dict[str, Any] = GOOD) -> dict[str, Finding]:
    lines = examine(runs=tmp_path / "runs", cache=tmp_path / "a" / "cache", probe=lambda: probe)
    return {line.topic: line for line in lines}


def test_a_machine_with_everything_is_healthy(tmp_path: Path) -> None:
    lines = found(tmp_path)
    assert healthy(list(lines.values()))
    assert lines["backends"].said == "gloo"
    assert lines["runs"].verdict == lines["cache"].verdict == "ok"
    assert not (tmp_path / "runs").exists()


def test_a_torch_that_does_not_import_is_missing(tmp_path: Path) -> None:
    line = found(tmp_path, {"error": "ImportError: libfoo.so"})["backends"]
    assert (line.verdict, line.fix) == ("missing", "pip install --force-reinstall torch")
    assert "libfoo.so" in line.said


def test_gpus_need_nccl(tmp_path: Path) -> None:
    lines = found(tmp_path, {**GOOD, "gpus": ["NVIDIA H100"]})
    assert lines["gpus"].said == "NVIDIA H100"
    assert lines["backends"].verdict == "missing"
    lines = found(tmp_path, {**GOOD, "gpus": ["NVIDIA H100"], "nccl": True})
    assert lines["backends"].verdict == "ok"


def test_a_missing_package_has_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("tokenizers", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = found(tmp_path)
    assert (lines["tokenizers"].verdict, lines["tokenizers"].fix) == ("missing", "pip install tokenizers")
    assert (lines["wandb"].verdict, lines["wandb"].fix) == ("note", "pip install wandb")
    assert not healthy(list(lines.values()))


@pytest.mark.parametrize(
    ("system", "release", "verdict", "said"),
    [
        ("Linux", "6.1", "ok", "supported in full"),
        ("Linux", "5.15-microsoft-standard-WSL2", "ok", "WSL2"),
        ("Darwin", "24", "note", "spawned, not forked, and talk over gloo"),
        ("Windows", "11", "missing", "through WSL2 only"),
        ("FreeBSD", "14", "note", "not tried by us"),
    ],
)
def test_what_is_said_of_a_platform(system: str, release: str, verdict: str, said: str) -> None:
    line = doctor._platform(system, release)
    assert line.verdict == verdict
    assert said in line.said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_missing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    line = found(tmp_path)["runs"]
    assert line.verdict == "missing"
    assert "--runs DIR" in line.fix


def test_an_unwritable_runs_folder_by_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    line = found(tmp_path)["runs"]
    assert (line.verdict, "Read-only file system" in line.said) == ("missing", True)


def test_the_probe_says_why_a_child_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "raise SystemExit('no such backend')")
    assert doctor.probe_torch() == {"error": "no such backend"}
    monkeypatch.setattr(doctor, "PROBE", 'print(\'{"torch": "9"}\')')
    assert doctor.probe_torch() == {"torch": "9"}
    monkeypatch.setattr(doctor, "PROBE", "while True: pass")
    monkeypatch.setattr(doctor, "PROBE_S", 0.2)
    assert doctor.probe_torch() == {"error": "import torch took more than 0 s"}


@pytest.mark.parametrize(("kernel", "verdict"), [(None, "note"), (Path("_shm.so"), "ok")])
def test_the_kernel_of_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path | None, verdict: str
) -> None:
    monkeypatch.setattr(doctor, "library", lambda: kernel)
    assert found(tmp_path)["shared memory"].verdict == verdict
