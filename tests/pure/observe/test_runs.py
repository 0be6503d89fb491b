"""Finding runs by path, name, the start of a name and `latest`; listing them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwise.errors import RunError
from shardwise.observe.runs import GLANCE_BYTES, find_run, glance, list_runs
from tests.pure.observe.story import Story


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for t, name in ((100.0, "20250101-gpt"), (200.0, "20250102-gpt"), (300.0, "20250203-resnet")):
        run = Story(t).start().step(1, t).write(root / name)
        os.utime(run / "events.jsonl", (t, t))
    (root / "not-a-run").mkdir()
    return root


def test_a_run_by_path_name_and_start(root: Path) -> None:
    run = root / "20250102-gpt"
    assert find_run(run, root) == run
    assert find_run("20250102-gpt", root) == run
    assert find_run("202502", root) == root / "20250203-resnet"


def test_latest_is_what_the_link_points_to_and_stays_that(root: Path) -> None:
    (root / "latest").symlink_to("20250101-gpt")
    for which in ("latest", str(root / "latest")):
        assert find_run(which, root) == root / "20250101-gpt"


def test_latest_without_a_link_is_the_run_that_changed_last(root: Path) -> None:
    assert find_run("latest", root) == root / "20250203-resnet"
    assert find_run(root / "latest", Path("elsewhere")) == root / "20250203-resnet"


def test_latest_with_a_link_to_nowhere_is_the_run_that_changed_last(root: Path) -> None:
    (root / "latest").symlink_to("deleted")
    assert find_run("latest", root) == root / "20250203-resnet"


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("20250203-resnt", "did you mean '20250203-resnet'?"),
        ("2025010", "the start of 2 runs"),
        ("not-a-run", "there is no run 'not-a-run'"),
        ("", "there is no run ''"),
    ],
)
def test_what_is_no_run_is_refused_with_the_nearest(root: Path, which: str, said: str) -> None:
    with pytest.raises(RunError, match="run") as error:
        find_run(which, root)
    assert said in str(error.value)


def test_a_folder_that_is_no_run_and_no_runs_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run: it has none of events.jsonl"):
        find_run(tmp_path, tmp_path)
    with pytest.raises(RunError, match="there is no run in .*Start one with: shardwise train FILE"):
        find_run("latest", tmp_path)


def test_runs_are_listed_newest_first_each_once(root: Path) -> None:
    (root / "latest").symlink_to("20250101-gpt")
    lines = list_runs(root)
    assert [line.name for line in lines] == ["20250203-resnet", "20250102-gpt", "20250101-gpt"]
    assert (lines[0].status, lines[0].step, lines[0].loss, lines[0].plan) == ("running", 1, 300.0, "data=2")
    assert list_runs(root / "nowhere") == []


def test_a_long_run_is_read_at_its_ends_only_and_right(tmp_path: Path) -> None:
    story = Story().start(steps=5000)
    for step in range(1, 5001):
        story.step(step, float(step))
    run = story.tell("run_finished", step=5000, status="stopped").write(tmp_path / "long")
    assert (run / "events.jsonl").stat().st_size > 4 * GLANCE_BYTES
    line = glance(run)
    assert (line.status, line.step, line.loss, line.ranks, line.started) == ("stopped", 5000, 5000.0, 2, 1000.0)


@pytest.mark.parametrize("steps", [280, 300, 320, 560, 600])
def test_a_run_around_the_size_of_a_glance_ends_with_its_last_step(tmp_path: Path, steps: int) -> None:
    story = Story().start()
    for step in range(1, steps + 1):
        story.step(step, float(step))
    assert glance(story.write(tmp_path / "r")).step == steps
