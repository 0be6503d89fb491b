"""What must be known before ranks start: the job is valid, its data is ready, and what its model costs.

Runs in a process of its own, forked from the zygote, so that the command line never imports torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import structs

from shardwise.data.source import Prepared
from shardwise.errors import JobError
from shardwise.spec import files
from shardwise.spec.job import JobFacts, TrainJob
from shardwise.spec.plan import Split, build_plan, parse_plan
from shardwise.spec.profile import ModelProfile
from shardwise.train import capture


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What the probing process found; crosses to the launcher as JSON."""

    parameters: dict[str, Any]
    sources: dict[str, str]
    facts: JobFacts
    profile: ModelProfile
    data: dict[str, Any]
    seconds: float
    splits: dict[str, Split] = {}  # over a tensor axis, where they were asked for
    whole: dict[str, str] = {}  # what that leaves whole, and why


def entry(
    *, source: dict[str, str], sets: dict[str, Any], out: str, cuts: bool, small: bool, split: str, **_: Any
) -> None:
    """Load the job, prepare its data, profile its model; write a Probe to `out`. Raises JobError or DataError."""
    from shardwise.train import context

    context.mark_launched()
    files.save(probe(capture.JobSource(**source), sets, cuts=cuts, small=small, split=split), out)


def probe(
    source: capture.JobSource, sets: Mapping[str, Any], *, cuts: bool = False, small: bool = False, split: str = ""
) -> Probe:
    """What must be known of a job, or of its `small` copy; with `cuts` also where its model can be cut into stages,
    with the text of a plan to `split` for also what its tensor axis splits."""
    began = time.perf_counter()
    function = capture.load_function(source)
    parameters = capture.bind(function, sets)
    job = capture.build(function, parameters, folder=source.folder)
    if small and job.small:
        parameters = capture.bind(function, {**job.small, **sets})
        job = capture.build(function, parameters, folder=source.folder)
    profile, data = look(job, folder=source.folder, cuts=cuts, small=small)
    splits, whole = _split(job, split, source.folder) if split else ({}, {})
    return Probe(
        splits=splits,
        whole=whole,
        parameters=parameters,
        sources=capture.local_sources(source),
        facts=facts(job),
        profile=profile,
        data=data,
        seconds=time.perf_counter() - began,
    )


def _split(job: TrainJob, plan: str, folder: str) -> tuple[dict[str, Split], dict[str, str]]:
    from shardwise.train.data import prepare
    from shardwise.train.splits import found_splits

    told = found_splits(job, build_plan(parse_plan(plan)), prepare(job), folder=folder)
    return told.splits, told.whole


def look(
    job: TrainJob, *, folder: str = "", cuts: bool = False, small: bool = False
) -> tuple[ModelProfile, dict[str, Any]]:
    """Prepare the data (through its cache) and profile the model on one sample of it; (profile, facts of the data)."""
    from shardwise.train.data import prepare
    from shardwise.train.small import shallow

    prepared = prepare(job)
    if small and not job.small:
        job = shallow(job, example_of(job, prepared, folder=folder))
    return profile_job(job, prepared, folder=folder, cuts=cuts), prepared.facts


def profile_job(job: TrainJob, prepared: Prepared, *, folder: str = "", cuts: bool = False) -> ModelProfile:
    """The profile of the job's model, run on one sample of its data."""
    from shardwise.models.cuts import profile_calls
    from shardwise.models.profile import profile
    from shardwise.parallel.blame import where

    example = example_of(job, prepared, folder=folder)
    try:
        found = profile(job.model, example, forward=job.forward)
        if cuts:
            calls = profile_calls(job.model, example, forward=job.forward, loss=job.loss)
            found = structs.replace(found, calls=calls)
        return found
    except JobError as error:
        place = where(error.__cause__, folder) if error.__cause__ else ""
        raise JobError(f"{error}" + (f" It failed{place}." if place else "")) from None


def example_of(job: TrainJob, prepared: Prepared, *, folder: str = "") -> Any:
    """A batch of one sample of the job's data."""
    from shardwise.parallel.blame import user_code

    with user_code("data of the job", folder=folder):
        train: Any = prepared.train
        return train.batch([0], [0]) if hasattr(train, "batch") else train.read([0], job.seed)[0]


def facts(job: TrainJob) -> JobFacts:
    """The part of a job that the planner needs."""
    stateful = {"AdamW": 8, "Adam": 8, "NAdam": 8, "RAdam": 8, "Adamax": 8, "SGD": 4, "RMSprop": 4, "Adagrad": 4}
    kinds = [o.optimizer for o in job.optimizers]
    names = [kind if isinstance(kind, str) else getattr(kind, "__name__", "") for kind in kinds]
    plain = [n == "SGD" and not o.options.get("momentum") for n, o in zip(names, job.optimizers, strict=True)]
    states = [0 if without else stateful.get(name, 8) for name, without in zip(names, plain, strict=True)]
    return JobFacts(
        global_batch=job.global_batch,
        steps=job.steps,
        precision=job.precision,
        allow=job.allow,
        state_bytes_per_parameter=max(states),
        logical_shards=job.logical_shards,
    )
