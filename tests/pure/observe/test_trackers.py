"""Trackers: real TensorBoard files read back; W&B and MLflow through stand-ins for their packages."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import MissingPackage, SpecError
from shardwise.observe.trackers import replay, scalars, tracker
from tests.pure.observe.story import Story


@pytest.fixture
def run(tmp_path: Path) -> Path:
    story = Story().start().step(1, 5.0).step(2, math.nan).tell("evaluation", step=2, loss=4.0, accuracy=0.5)
    run = story.tell("memory", rank=1, peak_bytes=7).write(tmp_path / "r")
    (run / "job.json").write_text('{"parameters": {"lr": 0.1, "layers": 2}}')
    return run


def test_a_step_becomes_scalars() -> None:
    event = Story().step(3, 5.0, seconds=2.0, lr=[0.1, 0.2], grad_norm=1.5).events[0]
    assert scalars(event) == {
        "train/loss": 5.0,
        "train/lr": 0.1,
        "train/grad_norm": 1.5,
        "rate/step_s": 2.0,
        "rate/tokens_s": 40.0,
        "rate/samples_s": 4.0,
        "time/compute_s": 0.6,
        "time/communicate_s": 0.2,
        "time/wait_s": 0.1,
        "time/optimizer_s": 0.05,
        "time/other_s": pytest.approx(1.05),
    }
    assert scalars({"event": "rank_ready", "rank": 0}) == {}


@pytest.mark.filterwarnings("default")  # of the tensorboard package and what it imports
def test_tensorboard_reads_back_what_was_written(run: Path) -> None:
    assert replay(run, "tensorboard") == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    losses = read.Scalars("train/loss")
    assert [(value.step, value.wall_time) for value in losses] == [(1, 1001.0), (2, 1002.0)]
    assert losses[0].value == 5.0
    assert math.isnan(losses[1].value)
    assert read.Scalars("eval/accuracy")[0].value == 0.5
    assert read.Scalars("memory/rank-1_peak_bytes")[0].step == 2
    assert "torch" not in sys.modules or "torch.utils.tensorboard" not in sys.modules


class Recorder(types.ModuleType):
    """A stand-in for a tracker's package: every call is kept, and returns the stand-in."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.run_id = "id-1"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "info":
            return self

        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_wandb_gets_the_run_its_parameters_and_every_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    replay(run, "wandb")
    name, _, told = wandb.calls[0]
    assert (name, told["name"], told["config"]) == ("init", "r", {"lr": "0.1", "layers": "2"})
    logged = [(args[0], kwargs["step"]) for name, args, kwargs in wandb.calls if name == "log"]
    assert [(found.get("train/loss", found.get("eval/loss")), step) for found, step in logged if step == 1] == [
        (5.0, 1)
    ]
    assert logged[-1] == ({"memory/rank-1_peak_bytes": 7.0}, 2)
    assert wandb.calls[-1] == ("finish", (), {"exit_code": 0})


def test_mlflow_gets_the_run_its_parameters_and_every_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "run_failed", "message": "x"}\n')
    replay(run, "mlflow")
    assert [name for name, _, _ in mlflow.calls[:2]] == ["start_run", "log_params"]
    logged = [kwargs for name, _, kwargs in mlflow.calls if name == "log_metrics"]
    assert [told["step"] for told in logged] == [1, 2, 2, 2]
    assert {told["run_id"] for told in logged} == {"id-1"}
    assert mlflow.calls[-1] == ("end_run", ("FAILED",), {})


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tensorboard", "pip install tensorboard"),
        ("wandb", "pip install wandb"),
        ("mlflow", "pip install mlflow-skinny"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=command):
        tracker(name, run)


def test_an_unknown_tracker_is_refused_with_the_nearest(run: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'tensorboard'"):
        tracker("tensorbord", run)
