"""Each pair in recipes/migrate: the same losses before and after, and as many changed lines as its README says."""

from __future__ import annotations

import csv
import difflib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "recipes"
MIGRATE = RECIPES / "migrate"
PAIRS = ("ddp", "accelerate", "lightning", "trainer")
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
PRINTED = re.compile(r"^rank (\d+) epoch (\d+) batch (\d+) loss (\S+)$", re.MULTILINE)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install -e '.[dev]'")


def run(folder: Path, *command: str) -> None:
    """Run `python COMMAND` in `folder` as a user would; its output is shown when it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COVERAGE"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def torchrun(folder: Path, script: str) -> dict[int, float]:
    """The losses of a script on two ranks that torchrun starts.

    It knows nothing of Shardwise. On a busy machine torch at times aborts a rank that has done all its work, on its way
    out (2 of 15 runs of ddp_before.py): such a run is begun again.
    """
    told = ("--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir")
    for logs in ("first", "second"):
        try:
            run(folder, "-m", "torch.distributed.run", *told, logs, str(MIGRATE / script))
            break
        except AssertionError:
            said = "".join(log.read_text() for log in (folder / logs).glob("**/stderr.log"))
            if logs == "second" or "terminate called without an active exception" not in said:
                raise
    return printed((folder / logs).glob("**/stdout.log"))


def shardwise(folder: Path, script: str) -> Path:
    """The run folder of a script or job on two ranks."""
    run(folder, "-m", "shardwise.cli.main", "train", str(MIGRATE / script), "--plan", "data=2", "--quiet")
    return folder / "runs" / "latest"


def printed(logs: Iterable[Path]) -> dict[int, float]:
    """Step -> the mean over ranks of the losses that they printed; their shares of the batch are equal."""
    losses: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for log in logs:
        for rank, epoch, batch, loss in PRINTED.findall(log.read_text()):
            losses[int(epoch), int(batch)][int(rank)] = float(loss)
    assert all(len(of_ranks) == 2 for of_ranks in losses.values())
    return dict(enumerate(fmean(losses[step].values()) for step in sorted(losses)))


def recorded(run_folder: Path) -> tuple[dict[int, float], float]:
    """Step -> loss of a Shardwise run, and the accuracy of its last evaluation."""
    lines = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    losses = {line["step"] - 1: line["loss"] for line in lines if line["event"] == "step"}
    return losses, [line["accuracy"] for line in lines if line["event"] == "evaluation"][-1]


def assert_same_curve(before: dict[int, float], after: dict[int, float], *, steps: int) -> None:
    assert sorted(before) == sorted(after) == list(range(steps))
    assert after == pytest.approx(before, rel=1e-5)
    assert after[steps - 1] < after[0] * 0.9, "nothing was learnt, so equal losses say little"


@TWO_CORES
def test_ddp(tmp_path: Path) -> None:
    before = torchrun(tmp_path, "ddp_before.py")
    weights = torch.load(tmp_path / "ddp.pt")
    after = printed((shardwise(tmp_path, "ddp_after.py") / "logs").glob("rank-*.log"))
    assert_same_curve(before, after, steps=48)
    torch.testing.assert_close(torch.load(tmp_path / "ddp.pt"), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs("accelerate")
@TWO_CORES
def test_accelerate(tmp_path: Path) -> None:
    before = torchrun(tmp_path, "accelerate_before.py")
    after = printed((shardwise(tmp_path, "accelerate_after.py") / "logs").glob("rank-*.log"))
    assert_same_curve(before, after, steps=48)


@pytest.mark.slow
@needs("lightning")
@TWO_CORES
def test_lightning(tmp_path: Path) -> None:
    run(tmp_path, str(MIGRATE / "lightning_before.py"))
    (metrics,) = tmp_path.glob("runs/lightning/*/metrics.csv")
    rows = list(csv.DictReader(metrics.read_text().splitlines()))
    before = {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    accuracy = [float(row["accuracy"]) for row in rows if row["accuracy"]][-1]
    after, found = recorded(shardwise(tmp_path, "lightning_after.py"))
    assert_same_curve(before, after, steps=32)
    assert found == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
@needs("transformers")
@TWO_CORES
def test_trainer(tmp_path: Path) -> None:
    run(tmp_path, str(MIGRATE / "trainer_before.py"))
    history = json.loads((tmp_path / "runs" / "trainer" / "trainer_state.json").read_text())["log_history"]
    before = {line["step"] - 1: line["loss"] for line in history if "loss" in line}
    (accuracy,) = (line["eval_accuracy"] for line in history if "eval_accuracy" in line)
    after, found = recorded(shardwise(tmp_path, "trainer_after.py"))
    assert_same_curve(before, after, steps=32)
    assert found == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_table_counts_the_changed_lines(pair: str) -> None:
    before, after = ((MIGRATE / f"{pair}_{when}.py").read_text().splitlines() for when in ("before", "after"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "-+"]
    removed = sum(line[0] == "-" for line in changes)
    row = (str(len(before)), str(len(after)), str(removed), str(len(changes) - removed))
    assert table()[pair][1:5] == row, "lines before, after, removed, added"


def test_the_table_has_every_pair_and_every_pair_is_whole() -> None:
    scripts = {path.stem for path in MIGRATE.glob("*.py")} - {"task"}
    assert scripts == {f"{pair}_{when}" for pair in PAIRS for when in ("before", "after")}
    assert set(table()) == set(PAIRS)


def table() -> dict[str, tuple[str, ...]]:
    """The rows of the README's table of pairs, by the pair's name."""
    text = (RECIPES / "README.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines()]
    return {found[1]: row for row in rows if (found := re.match(r"`migrate/(\w+)_before\.py`", row[0]))}
