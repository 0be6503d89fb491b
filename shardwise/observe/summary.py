"""`Summary`: a run in numbers, computed from its folder; predicted beside measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from shardwise.errors import SpecError
from shardwise.events import Event
from shardwise.observe import history, runs
from shardwise.observe.exchanged import Axis, Exchanged, Exposed, axes_of, counted_of, exchanged_of, exposed_of
from shardwise.observe.history import amount, committed, finite, named, number, printable, whole, word
from shardwise.observe.timeline import Spent, spent_of
from shardwise.spec.cluster import Cluster
from shardwise.spec.files import load
from shardwise.spec.plan import Plan, Prediction
from shardwise.spec.profile import ModelProfile

T = TypeVar("T")
CURVE_POINTS = 24
PARTS = ("compute", "communicate", "wait", "optimizer", "other")  # of a step; `wait` is for data
PART_OF_PREDICTION = {"forward": "compute", "backward": "compute", "communication": "communicate"}
NOT_METRICS = ("t", "event", "step", "loss", "perplexity", "seconds", "weight")
FIELD_OF_PART = {"compute": "compute_s", "communicate": "comm_s", "wait": "wait_s", "optimizer": "optimizer_s"}


class Loss(Struct, frozen=True, kw_only=True):
    """Training loss of the first and last step, the lowest with its step, and means over equal parts of the run."""

    first: float | None = None
    last: float | None = None
    best: float | None = None
    best_step: int | None = None
    curve: tuple[float, ...] = ()


class Evaluation(Struct, frozen=True, kw_only=True):
    """One evaluation on held-out data; `metrics` are the user's."""

    step: int
    loss: float | None
    perplexity: float | None
    metrics: dict[str, float]


class Rate(Struct, frozen=True, kw_only=True):
    """Over all steps but the first (which warms up). `flop_share` is of the cluster's peak, 1.0 being all of it."""

    step_s: float | None = None
    samples_s: float | None = None
    tokens_s: float | None = None
    flop_share: float | None = None


class Compared(Struct, frozen=True, kw_only=True):
    """A prediction of the plan beside what was measured, both in `unit`."""

    name: str
    unit: str
    predicted: float
    measured: float


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint that was written."""

    step: int
    path: str
    num_bytes: int
    seconds: float


class Summary(Struct, frozen=True, kw_only=True):
    """What `shardwise show` prints. `step` counts finished steps; sizes in bytes; the shares in `time` sum to 1.

    None or empty: the run did not record it.
    """

    path: str
    run: str
    status: str
    job: str
    parameters: dict[str, Any]
    plan: str
    ranks: int | None
    step: int
    of_steps: int | None
    seconds: float
    silent_s: float | None
    facts: dict[str, Any]
    loss: Loss
    evaluation: Evaluation | None
    rate: Rate
    time: dict[str, float]
    run_seconds: dict[str, float]
    peak_bytes: dict[int, int]
    timeline: Spent
    compared: tuple[Compared, ...]
    axes: tuple[Axis, ...]
    exposed: Exposed | None
    exchanged: tuple[Exchanged, ...]
    counted_bytes: dict[str, int]
    checkpoints: tuple[Checkpoint, ...]
    resumed: tuple[str, ...]
    skipped: int
    warnings: tuple[str, ...]
    failure: str

    def _repr_html_(self) -> str:
        from shardwise.observe.html import summary_html

        return summary_html(self)


def read(run: Path, *, now: float | None = None) -> Summary:
    """Sum up the run in the folder `run`. `now` (seconds since 1970) tells how long a running one has been silent.

    Nothing that is missing, cut short or not finite in the folder is an error; what cannot be computed is None.
    Raises RunError only when `events.jsonl` is there but may not be read.
    """
    unreadable: list[str] = []
    plan = _load(run / "plan.json", Plan, unreadable)
    cluster = _load(run / "cluster.json", Cluster, unreadable)
    profile = _load(run / "profile.json", ModelProfile, unreadable)
    return summarise(
        run,
        history.read(run),
        plan=plan,
        cluster=cluster,
        profile=profile,
        job=job_record(run),
        now=now,
        notes=unreadable,
    )


def summarise(
    run: Path,
    found: Sequence[Event],
    *,
    plan: Plan | None = None,
    cluster: Cluster | None = None,
    profile: ModelProfile | None = None,
    job: Mapping[str, Any] | None = None,
    now: float | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """The pure part of `read`: the same events give the same Summary."""
    steps = committed(found)
    started = (named(found, "run_started") or [{}])[-1]
    state = runs.status(list(found))
    facts = facts_of((named(found, "data_ready") or [{}])[-1])
    rate = _rate(steps, plan, cluster, profile, text="tokens" in facts)
    memory = _peak_bytes(found)
    predicted = _prediction(started, plan)
    ranks = whole(started, "ranks") or (plan.ranks if plan else None)
    return Summary(
        path=str(run),
        run=word(started, "run") or run.name,
        status=state,
        job=word(started, "job"),
        parameters=parameters_of(job or {}),
        plan=str(plan) if plan else word(started, "plan"),
        ranks=ranks,
        step=whole(steps[-1], "step") or 0 if steps else 0,
        of_steps=whole(started, "steps"),
        seconds=_wall_seconds(found),
        silent_s=_silent_s(found, now) if state == "running" else None,
        facts=facts,
        loss=_loss(steps),
        evaluation=_evaluation(found),
        rate=rate,
        time=_shares(steps),
        run_seconds=_run_seconds(found, steps),
        peak_bytes=memory,
        timeline=spent_of(found),
        compared=_compared(predicted, rate, steps, memory),
        axes=axes_of(found),
        exposed=exposed_of(steps, predicted, ranks),
        exchanged=exchanged_of(found),
        counted_bytes=counted_of(found),
        checkpoints=_checkpoints(run, found),
        resumed=tuple(_resumed(event) for event in named(found, "resumed")),
        skipped=sum(event.get("skipped") is True for event in steps),
        warnings=(*notes, *_warnings(found)),
        failure=_failure(found) if state == "failed" else "",
    )


def job_record(run: Path) -> dict[str, Any]:
    """What `job.json` holds, or an empty dict when it is missing or broken."""
    try:
        value = msgspec.json.decode((run / "job.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def parameters_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved parameters in a `job.json`."""
    found = job.get("parameters")
    return {printable(str(name)): value for name, value in found.items()} if isinstance(found, Mapping) else {}


def tokens(event: Event, *, text: bool) -> float:
    """Tokens of a step: its own count, or on text the loss's weight, which counts the tokens that were predicted."""
    return amount(event, "tokens") or (amount(event, "weight") if text else 0.0)


def step_parts(event: Event) -> dict[str, float]:
    """Seconds of one step by part, in the order of PARTS; `other` is what no measurement claimed."""
    parts = {part: amount(event, key) for part, key in FIELD_OF_PART.items()}
    return {**parts, "other": max(0.0, amount(event, "seconds") - sum(parts.values()))}


def _load(path: Path, kind: type[T], unreadable: list[str]) -> T | None:
    if not path.is_file():
        return None
    try:
        return load(path, kind)
    except SpecError as error:
        unreadable.append(f"left out: {error}")
        return None


def _loss(steps: Sequence[Event]) -> Loss:
    if not steps:
        return Loss()
    losses = [(value, whole(step, "step")) for step in steps if (value := finite(step, "loss")) is not None]
    best, best_step = min(losses, key=lambda pair: pair[0], default=(None, None))
    size = -(-len(losses) // CURVE_POINTS) or 1
    cut = [losses[start : start + size] for start in range(0, len(losses), size)]
    return Loss(
        first=number(steps[0], "loss"),
        last=number(steps[-1], "loss"),
        best=best,
        best_step=best_step,
        curve=tuple(statistics.fmean(value for value, _ in part) for part in cut),
    )


def _evaluation(found: Sequence[Event]) -> Evaluation | None:
    done = committed(found, "evaluation")
    return evaluation_of(done[-1]) if done else None


def evaluation_of(event: Event) -> Evaluation:
    """An `evaluation` event as a value; every further number in it is a metric of the user."""
    metrics = {
        printable(key): value for key in event if key not in NOT_METRICS and (value := number(event, key)) is not None
    }
    return Evaluation(
        step=whole(event, "step") or 0,
        loss=number(event, "loss"),
        perplexity=number(event, "perplexity"),
        metrics=metrics,
    )


def _rate(
    steps: Sequence[Event],
    plan: Plan | None,
    cluster: Cluster | None,
    profile: ModelProfile | None,
    *,
    text: bool,
) -> Rate:
    """Totals over total seconds; the FLOPs of a step are three forward passes (Narayanan et al. 2021, section 5.1)."""
    warm = [step for step in (steps[1:] or steps) if amount(step, "seconds") > 0]
    seconds = sum(amount(step, "seconds") for step in warm)
    if not seconds:
        return Rate()
    samples_s = sum(amount(step, "samples") for step in warm) / seconds
    tokens_s = sum(tokens(step, text=text) for step in warm) / seconds
    dtype = plan.precision if plan else "float32"
    peak = (
        sum(device.peak_flops.get(dtype) or device.peak_flops.get("float32", 0.0) for device in cluster.devices)
        if cluster
        else 0.0
    )
    flops = 3 * profile.forward_flops * samples_s if profile else 0.0
    return Rate(
        step_s=statistics.median(amount(step, "seconds") for step in warm),
        samples_s=samples_s or None,
        tokens_s=tokens_s or None,
        flop_share=flops / peak if flops and peak else None,
    )


def _shares(steps: Sequence[Event]) -> dict[str, float]:
    totals = dict.fromkeys(PARTS, 0.0)
    for step in steps:
        for part, seconds in step_parts(step).items():
            totals[part] += seconds
    whole_s = sum(totals.values())
    return {part: seconds / whole_s for part, seconds in totals.items()} if whole_s else {}


def _run_seconds(found: Sequence[Event], steps: Sequence[Event]) -> dict[str, float]:
    """Wall seconds of the whole run by what it did; `other` is start-up, shutdown and whatever was not measured."""
    parts = {
        "data": sum(amount(event, "seconds") for event in named(found, "data_ready")),
        "steps": sum(amount(step, "seconds") for step in steps),
        "evaluation": sum(amount(event, "seconds") for event in named(found, "evaluation")),
        "checkpoints": sum(amount(event, "seconds") for event in named(found, "checkpoint_saved")),
    }
    return {**parts, "other": max(0.0, _wall_seconds(found) - sum(parts.values()))}


def _wall_seconds(found: Sequence[Event]) -> float:
    """From the first to the last event, without the pauses between a run's end and its resumption."""
    total, first, last = 0.0, None, None
    for event in found:
        at = finite(event, "t")
        if at is None:
            continue
        if event["event"] == "run_started" and first is not None and last is not None:
            total, first = total + max(0.0, last - first), None
        first = at if first is None else first
        last = at
    return total + (max(0.0, last - first) if first is not None and last is not None else 0.0)


def _silent_s(found: Sequence[Event], now: float | None) -> float | None:
    times = [at for event in found if (at := finite(event, "t")) is not None]
    return max(0.0, now - max(times)) if now is not None and times else None


def facts_of(event: Event) -> dict[str, Any]:
    """What a `data_ready` event said of the data, nested under `facts` or not."""
    nested = event.get("facts")
    flat = {key: value for key, value in event.items() if key not in ("t", "event", "seconds", "facts")}
    return {**flat, **(nested if isinstance(nested, dict) else {})}


def _peak_bytes(found: Sequence[Event]) -> dict[int, int]:
    peaks: dict[int, int] = {}
    for event in named(found, "memory"):
        rank, peak = whole(event, "rank"), whole(event, "peak_bytes")
        if rank is not None and peak is not None:
            peaks[rank] = max(peak, peaks.get(rank, 0))
    return dict(sorted(peaks.items()))


def _prediction(started: Event, plan: Plan | None) -> Prediction | None:
    try:
        given: Prediction | None = msgspec.convert(started.get("predicted"), Prediction)
    except msgspec.ValidationError:
        given = plan.predicted if plan else None
    return given if given and all(map(math.isfinite, (given.step_s, *given.parts_s.values()))) else None


def _compared(
    predicted: Prediction | None, rate: Rate, steps: Sequence[Event], memory: Mapping[int, int]
) -> tuple[Compared, ...]:
    if predicted is None:
        return ()
    rows: list[Compared] = []
    if rate.step_s is not None:
        rows.append(Compared(name="step", unit="s", predicted=predicted.step_s, measured=rate.step_s))
        measured = _median_parts(steps[1:] or steps)
        for part, seconds in _predicted_parts(predicted).items():
            if part in measured:
                rows.append(Compared(name=part, unit="s", predicted=seconds, measured=measured[part]))
    if memory:
        peak = max(memory.values())
        rows.append(Compared(name="peak memory", unit="bytes", predicted=predicted.peak_bytes, measured=peak))
    return tuple(rows)


def _predicted_parts(predicted: Prediction) -> dict[str, float]:
    parts: dict[str, float] = {}
    for name, seconds in predicted.parts_s.items():
        part = PART_OF_PREDICTION.get(name, name)
        parts[part] = parts.get(part, 0.0) + seconds
    return parts


def _median_parts(steps: Sequence[Event]) -> dict[str, float]:
    split = [step_parts(step) for step in steps]
    return {part: statistics.median(parts[part] for parts in split) for part in PARTS} if split else {}


def _checkpoints(run: Path, found: Sequence[Event]) -> tuple[Checkpoint, ...]:
    return tuple(
        Checkpoint(
            step=whole(event, "step") or 0,
            path=inside_run(run, word(event, "path")),
            num_bytes=whole(event, "bytes") or 0,
            seconds=amount(event, "seconds"),
        )
        for event in committed(found, "checkpoint_saved")
    )


def inside_run(run: Path, path: str) -> str:
    """The path from the run folder on, if it lies there."""
    before, folder, rest = path.rpartition(f"/{run.name}/")
    return rest if folder and before else path


def _resumed(event: Event) -> str:
    ranks = whole(event, "from_ranks")
    return f"at step {whole(event, 'step') or 0}" + (
        f", from {ranks} {'rank' if ranks == 1 else 'ranks'}" if ranks else ""
    )


def _warnings(found: Sequence[Event]) -> list[str]:
    return [text for event in found if (text := warning_text(event))]


def warning_text(event: Event) -> str:
    """The one-line warning that an event stands for; empty for events that are none."""
    at = whole(event, "step")
    match event["event"]:
        case "warning":
            return word(event, "message")
        case "checkpoint_damaged":
            return f"checkpoint {word(event, 'path')} is damaged: {word(event, 'why')}"
        case "non_finite":
            return f"loss or gradient not finite in step {at}, samples {_samples(event)}"
        case "sync_chosen":
            return f"sync=auto: {word(event, 'why')}"
        case "sync_given_up":
            return f"sync=auto went back to all_reduce: {word(event, 'why')}"
        case "early_stop":
            best = whole(event, "best_step")
            since = "" if best is None else f" since step {best}"
            return f"stopped early at step {at}: {word(event, 'metric')} has not improved{since}"
    return ""


def _samples(event: Event) -> str:
    samples = event.get("samples")
    if not isinstance(samples, list):
        return "not recorded"
    return printable(", ".join(map(str, samples[:8]))) + (", ..." if len(samples) > 8 else "")


def _failure(found: Sequence[Event]) -> str:
    """The message of the error that ended the run, line by line: it may hold a diff or the end of a log."""
    event = (named(found, "run_failed") or [{}])[-1]
    lines = [printable(line) for line in str(event.get("message") or event.get("kind") or "").splitlines()]
    return "\n".join(filter(None, lines)) or "no reason was recorded"
