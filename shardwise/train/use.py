"""What a trained run is used for in this process: go on with text, evaluate a checkpoint, export weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from shardwise.checkpoint.export import export as export_checkpoint
from shardwise.checkpoint.load import best, newest_whole
from shardwise.checkpoint.manifest import Manifest, committed, read
from shardwise.checkpoint.resume import restore
from shardwise.checkpoint.store import LocalStore
from shardwise.comm.mesh import connect
from shardwise.data.source import Prepared
from shardwise.errors import CheckpointError, DataError, JobError
from shardwise.parallel.blame import user_code
from shardwise.spec.job import TrainJob
from shardwise.spec.plan import Plan
from shardwise.train import capture
from shardwise.train.context import device_of
from shardwise.train.data import prepare
from shardwise.train.folder import RunFolder
from shardwise.train.run import build_replica, evaluate_replica


def sample(
    folder: RunFolder,
    prompt: str,
    *,
    tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    checkpoint: str = "latest",
) -> Iterator[str]:
    """Pieces of text, as they are made, that the run's model goes on with after `prompt`; fixed by the seed."""
    from tokenizers import Tokenizer

    from shardwise.models.generate import stream

    job = load_job(folder)
    prepared = prepare(job)
    path = prepared.facts.get("tokenizer")
    if not path:
        raise JobError("this run was not trained on text, so there is nothing to sample. Use shardwise evaluate.")
    module = load_module(folder, job, checkpoint).eval()
    tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer.encode(prompt).ids
    if not ids:
        ids = [int(prepared.facts["end_token"])]  # an empty prompt begins a new document
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = []
    said = ""
    for token in stream(
        module, torch.tensor([ids]), tokens, temperature=temperature, top_k=top_k or None, generator=generator
    ):
        if int(token) == prepared.facts["end_token"]:
            return
        made.append(int(token))
        whole = tokenizer.decode(made)
        if not whole.endswith("\ufffd"):  # half of a character of several bytes
            yield whole[len(said) :]
            said = whole


def evaluate(folder: RunFolder, *, checkpoint: str = "latest") -> dict[str, float]:
    """Loss and metrics of a checkpoint on the held-out samples, on one rank."""
    import math

    job = load_job(folder)
    prepared: Prepared = prepare(job)
    if prepared.eval is None:
        raise DataError("this run's data has no held-out part to evaluate on. Give the job's data one.")
    chosen = choose(folder, checkpoint)
    mesh = connect(Plan(precision=chosen.plan.precision), rank=0, world=1, store=None, device=device_of(0))
    replica = build_replica(job, mesh.plan, mesh)
    restore(_store(folder), chosen, replica.module)
    found = evaluate_replica(replica, prepared, job)
    if "tokens" in prepared.facts:
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    return found


def export(
    folder: RunFolder, *, to: Literal["safetensors", "dcp", "transformers"], out: Path, checkpoint: str = "latest"
) -> Path:
    """Write the run's weights in another format to `out`."""
    module, tokenizer = None, None
    if to == "transformers":  # the other formats need only what is in the checkpoint
        job = load_job(folder)
        module, tokenizer = load_module(folder, job, checkpoint), prepare(job).facts.get("tokenizer")
    chosen = _store(folder).where(choose(folder, checkpoint).folder)
    return export_checkpoint(chosen, to, out, module=module, tokenizer=tokenizer)


def load_job(folder: RunFolder) -> TrainJob:
    """The kept copy of the run's job."""
    source, record = folder.source(), folder.record()
    if not source.function:
        raise JobError(f"{folder.path.name} is the run of a script, which has no job to build its model from.")
    function = capture.load_function(source, original=record.original)
    return capture.build(function, capture.bind(function, record.parameters), folder=source.folder)


def load_module(folder: RunFolder, job: TrainJob, checkpoint: str) -> torch.nn.Module:
    """The job's module with the weights of a checkpoint."""
    with user_code("model of the job"):
        module: Any = job.model()
    assert isinstance(module, torch.nn.Module)
    chosen = choose(folder, checkpoint)
    if chosen.plan.precision == "float64":
        module.to(torch.float64)
    restore(_store(folder), chosen, module)
    return module


def choose(folder: RunFolder, which: str) -> Manifest:
    """The checkpoint called `latest` (the newest whole one), `best`, or a step. Raises CheckpointError."""
    store = _store(folder)
    found = {"latest": newest_whole, "best": best}[which](store) if which in ("latest", "best") else None
    if found is None and which.isdigit():
        steps = {manifest.step: manifest for manifest in (read(store, name) for name in committed(store))}
        if int(which) in steps:
            return steps[int(which)]
        known = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(
            f"--checkpoint {which}: {folder.path.name} has no checkpoint of that step; it has {known}."
        )
    if found is None:
        raise CheckpointError(
            f"--checkpoint {which}: {folder.path.name} has no such checkpoint. Use latest, best, or a step's number."
        )
    return found


def _store(folder: RunFolder) -> LocalStore:
    return LocalStore(folder.checkpoints)
