"""Experiment trackers as event sinks: TensorBoard, Weights & Biases, MLflow. Each is imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from shardwise.errors import MissingPackage, SpecError, did_you_mean
from shardwise.events import Event
from shardwise.observe import history
from shardwise.observe.history import amount, finite, learning_rate, number, whole
from shardwise.observe.summary import NOT_METRICS, PARTS, job_record, parameters_of, step_parts


class Tracker(Protocol):
    """A sink that also has an end. `status` is what `run_finished` said, or `failed`."""

    def __call__(self, event: Event) -> None: ...

    def close(self, status: str = "finished") -> None: ...


def tracker(name: str, run: Path) -> Tracker:
    """The tracker called `name` (a key of TRACKERS) for the run in that folder.

    Raises SpecError for an unknown name and MissingPackage, with the command that installs it, without its package.
    """
    if name not in TRACKERS:
        raise SpecError(f"there is no tracker '{name}' for log{did_you_mean(name, TRACKERS)}")
    return TRACKERS[name](run)


def replay(run: Path, name: str) -> int:
    """Send all events of a run that is over to a tracker; returns how many there were."""
    found = history.read(run)
    target = tracker(name, run)
    status = "failed"
    try:
        for event in found:
            target(event)
        status = "failed" if any(event["event"] == "run_failed" for event in found) else "finished"
    finally:
        target.close(status)
    return len(found)


def scalars(event: Event) -> dict[str, float]:
    """The numbers that an event adds to a tracker, by the name they get there; empty for most events."""
    match event["event"]:
        case "step":
            return _step_scalars(event)
        case "evaluation":
            names = ("loss", "perplexity", *(key for key in event if key not in NOT_METRICS))
            return {f"eval/{key}": value for key in names if (value := number(event, key)) is not None}
        case "memory":
            peak, rank = finite(event, "peak_bytes"), whole(event, "rank")
            return {} if peak is None or rank is None else {f"memory/rank-{rank}_peak_bytes": peak}
    return {}


def _step_scalars(event: Event) -> dict[str, float]:
    given = {
        "train/loss": number(event, "loss"),
        "train/lr": learning_rate(event),
        "train/grad_norm": number(event, "grad_norm"),
    }
    found = {name: value for name, value in given.items() if value is not None}
    seconds = amount(event, "seconds")
    if seconds:
        found["rate/step_s"] = seconds
        found |= {f"rate/{what}_s": amount(event, what) / seconds for what in ("tokens", "samples") if event.get(what)}
        parts = step_parts(event)
        found |= {f"time/{part}_s": parts[part] for part in PARTS}
    return found


class TensorBoard:
    """Event files in `<run>/tensorboard`, written with the `tensorboard` package alone (no torch, no TensorFlow)."""

    def __init__(self, run: Path) -> None:
        _need("tensorboard", "TensorBoard")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2")
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer = writer.EventFileWriter(str(run / "tensorboard"))
        self._step = 0

    def __call__(self, event: Event) -> None:
        found = scalars(event)
        if found:
            self._add(event, found)
        if event["event"] in ("checkpoint_saved", "evaluation", "memory"):
            self._writer.flush()

    def _add(self, event: Event, found: dict[str, float]) -> None:
        self._step = step = _at(event, self._step)
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in found.items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=finite(event, "t") or 0.0, step=step, summary=summary))

    def close(self, status: str = "finished") -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the W&B project `shardwise`; account and server come from `wandb`'s own settings."""

    def __init__(self, run: Path) -> None:
        wandb = _need("wandb", "Weights & Biases")
        self._run = wandb.init(project="shardwise", name=run.name, dir=str(run), config=parameters(run))
        self._step = 0

    def __call__(self, event: Event) -> None:
        found = scalars(event)
        if found:
            self._step = _at(event, self._step)
            self._run.log(found, step=self._step)

    def close(self, status: str = "finished") -> None:
        self._run.finish(exit_code=1 if status == "failed" else 0)


class MLflow:
    """A run in the MLflow experiment that `mlflow`'s own settings choose."""

    def __init__(self, run: Path) -> None:
        self._mlflow = _need("mlflow", "MLflow", package="mlflow-skinny")
        self._run_id = self._mlflow.start_run(run_name=run.name).info.run_id
        self._mlflow.log_params(parameters(run))
        self._step = 0

    def __call__(self, event: Event) -> None:
        found = scalars(event)
        if found:
            self._step = _at(event, self._step)
            self._mlflow.log_metrics(found, step=self._step, run_id=self._run_id)

    def close(self, status: str = "finished") -> None:
        self._mlflow.end_run("FAILED" if status == "failed" else "FINISHED")


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def parameters(run: Path) -> dict[str, str]:
    """The job's resolved parameters, as text."""
    return {name: str(value) for name, value in parameters_of(job_record(run)).items()}


def _at(event: Event, before: int) -> int:
    step = whole(event, "step")
    return before if step is None else step


def _need(module: str, what: str, package: str = "") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingPackage(
            f"log asks for {what}, but the package '{package or module}' is not installed. "
            f"Install it with: pip install {package or module}, or leave it out of log."
        ) from None
