"""Every mistake is one paragraph that names the field, the value and what to do; nothing half-written is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import DataError, JobError, NoPlanFits, RunError, ShardwiseError, SpecError

Train = Callable[..., Any]

HEAD = """
import torch
import shardwise as sw

def parts(**changes):
    fields = dict(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(4, 3)),
        loss=sw.cross_entropy,
        data=sw.arrays({"inputs": torch.randn(8, 4), "targets": torch.arange(8) % 3}),
        forward=lambda model, batch: model(batch["inputs"]),
        optimizer=sw.sgd(lr=0.1), global_batch=4, steps=2,
    )
    return sw.TrainJob(**{**fields, **changes})
"""

CASES: list[tuple[str, str, dict[str, Any], type[ShardwiseError], list[str]]] = [
    ("syntax error", "def job(:\n    pass\n", {}, JobError, ["bad.py:1"]),
    ("import error", "import no_such_thing\ndef job(): ...\n", {}, JobError, ["no_such_thing", "bad.py:1"]),
    ("error in job", HEAD + "def job():\n    return 1 / 0\n", {}, JobError, ["job function job", "ZeroDivisionError"]),
    ("no TrainJob", HEAD + "def job():\n    return 3\n", {}, JobError, ["returned int", "TrainJob"]),
    ("unknown field", HEAD + "def job():\n    return parts(lss=1)\n", {}, JobError, ["lss"]),
    ("bad value", HEAD + "def job():\n    return parts(steps=0)\n", {}, SpecError, ["steps=0"]),
    ("unknown --set", HEAD + "def job(lr: float = 1):\n    return parts()\n", {"sets": ["lrr=1"]}, JobError, ["'lr'"]),
    (
        "shape",
        HEAD + "def job():\n    return parts(model=lambda: torch.nn.Linear(5, 3))\n",
        {},
        JobError,
        ["model", "bad.py"],
    ),
    (
        "output shape",
        HEAD + "def job():\n    return parts(model=lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), "
        "torch.nn.Unflatten(1, (3, 1, 1))))\n",
        {},
        JobError,
        ["cross-entropy", "targets"],
    ),
    (
        "loss not a pair",
        HEAD + "def job():\n    return parts(loss=lambda output, batch: output.sum())\n",
        {},
        JobError,
        ["loss", "(sum, weight)"],
    ),
    (
        "optimizer",
        HEAD + "def job():\n    return parts(optimizer=sw.optimizer('Adm', lr=1))\n",
        {},
        JobError,
        ["'Adam'"],
    ),
    (
        "optimizer option",
        HEAD + "def job():\n    return parts(optimizer=sw.adamw(lr=0.1, beta=3))\n",
        {},
        JobError,
        ["optimizer AdamW", "beta"],
    ),
    (
        "parameters left",
        HEAD + "def job():\n    return parts(optimizer=sw.sgd(lr=0.1, params='*.weight'))\n",
        {},
        JobError,
        ["0.bias"],
    ),
    (
        "frozen",
        HEAD + "def job():\n    return parts(model=lambda: parts().model().requires_grad_(False))\n",
        {},
        JobError,
        ["trainable"],
    ),
    ("empty data", HEAD + "def job():\n    return parts(data=sw.dataset([]))\n", {}, DataError, ["sample"]),
    ("no description", HEAD + "def job():\n    return parts(data=[1, 2])\n", {}, JobError, ["sw.dataset"]),
    (
        "too many ranks",
        HEAD + "def job():\n    return parts(global_batch=8)\n",
        {"plan": "data=64"},
        NoPlanFits,
        ["64", "data="],
    ),
    ("axis not there", HEAD + "def job():\n    return parts()\n", {"plan": "expert=2"}, SpecError, ["expert=2"]),
    ("unknown axis", HEAD + "def job():\n    return parts()\n", {"plan": "tensr=2"}, SpecError, ["'tensor'"]),
    ("precision", HEAD + "def job():\n    return parts()\n", {"plan": "precision=bfloat16"}, SpecError, ["allow"]),
]


@pytest.mark.parametrize(("text", "options", "kind", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_mistake_is_one_clear_paragraph(
    text: str, options: dict[str, Any], kind: type[ShardwiseError], says: list[str], trained: Train, tmp_path: Path
) -> None:
    job = tmp_path / "bad.py"
    job.write_text(text)
    with pytest.raises(kind) as caught:
        trained(job, **options)
    for word in says:
        assert word in str(caught.value)
    assert "Traceback" not in str(caught.value)
    kept = [p for p in (tmp_path / "runs").glob("*/checkpoints/*")]
    assert not kept, "a run that never took a step leaves no checkpoint"


def test_an_empty_corpus_and_a_file_that_is_not_text(trained: Train, tmp_path: Path) -> None:
    job = tmp_path / "bad.py"
    for name, raw, word in (("empty.txt", b"", "text"), ("binary.txt", b"\x00\xff" * 500, "binary.txt")):
        (tmp_path / name).write_bytes(raw)
        data = f"sw.text({str(tmp_path / name)!r}, tokenizer='bytes', vocab=257, context=4, held_out=0)"
        job.write_text(HEAD + f"def job():\n    return parts(data={data})\n")
        with pytest.raises(DataError) as caught:
            trained(job)
        assert word in str(caught.value)


def test_a_run_folder_that_cannot_be_written(trained: Train, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(RunError, match="--runs DIR"):
        trained(runs=tmp_path / "taken")


def test_a_checkpoint_of_another_model_is_refused(trained: Train, tmp_path: Path) -> None:
    from shardwise.errors import CheckpointError

    file = tmp_path / "small.py"
    text = file.read_text()
    first = trained(steps=4, save_every=2)
    (first.path / "code" / "small.py").write_text(
        text.replace("Linear(6, 16)", "Linear(6, 8)").replace("(16, 3)", "(8, 3)")
    )
    file.write_text(text.replace("Linear(6, 16)", "Linear(6, 8)").replace("(16, 3)", "(8, 3)"))
    with pytest.raises(CheckpointError, match=r"layers\.0"):
        trained(resume="latest")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_run_with_one_paragraph(trained: Train, tmp_path: Path) -> None:
    small = tmp_path / "disk"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount a file system")
    try:
        with pytest.raises(ShardwiseError, match=r"(?i)no space left|full"):
            trained(runs=small / "runs", save_every=1, steps=40)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_command_line_prints_the_paragraph_and_exits_with_the_class_s_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", "train", str(tmp_path / "none.py")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == JobError.exit_code
    assert "there is no job file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
