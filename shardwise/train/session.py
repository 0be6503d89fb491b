"""`sw.session`: the short loop of one's own. The user owns the loop; the session owns ranks, steps and records."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from msgspec import structs

from shardwise import events
from shardwise.data.datasets import dataset
from shardwise.data.loader import LocalStep, Micro
from shardwise.data.order import stream_seed
from shardwise.data.source import Prepared
from shardwise.errors import JobError, SpecError, did_you_mean
from shardwise.parallel.step import StepResult
from shardwise.plan.formats import refuse_other_numbers
from shardwise.plan.synchronisations import refuse_unallowed
from shardwise.spec.job import Optimizer, TrainJob
from shardwise.spec.plan import Plan, Precision, build_plan, parse_plan
from shardwise.train import context
from shardwise.train.adopt import Adopted
from shardwise.train.data import prepare
from shardwise.train.folder import RunFolder
from shardwise.train.run import Trainer
from shardwise.train.state import Saver

_numbers = itertools.count(1)  # every rank opens the sessions of a script in one order

Metrics = Mapping[str, Callable[[Any, Any], tuple[Any, Any]]]


class Session:
    """A run whose loop the user writes: `for batch in run.batches(): run.step(batch)`. Use it in a `with` block.

    Made by `session`. Every rank runs the same loop; `batches` gives each its own share of the global batch.
    """

    def __init__(self, job: TrainJob | None, plan: Plan | None, prepared: Prepared | None, runs: Path | None) -> None:
        self.job = job
        self._plan = plan
        self._prepared = prepared
        self._runs = runs
        self._stack = ExitStack()
        self._pending: tuple[Any, LocalStep] | None = None
        self._trainer: Trainer | None = None
        self._adopted: Adopted | None = None
        self._began = 0.0  # when this session opened a run folder of its own

    def __enter__(self) -> Session:
        self.context = context.current(self._plan)
        self.mesh = self.context.mesh
        self.mesh.obey(self._chosen_plan())
        self._refuse_unplayed()
        if self.job is not None:
            refuse_other_numbers(self.mesh.plan, self.job.allow)
        if self.job is not None and self.mesh.world > 1:
            refuse_unallowed(self.mesh.plan, self.job.allow)
        self.folder = self._open_folder()
        if self.job is not None:
            prepared = self._prepared or prepare(self.job)
            saver = Saver(self.folder, self.mesh, self.job, number=next(_numbers))
            self._trainer = Trainer(self.job, self.mesh.plan, self.mesh, prepared, saver)
            self._stack.callback(self._trainer.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if self._adopted is not None:
                self._adopted.close()
            if error is None and self._trainer is not None:
                self._trainer.finish()
                self._trainer.gather()
            if self._began:
                events.emit("wire", rank=self.mesh.rank, groups=self.mesh.traffic())
            if self._began and self.mesh.rank == 0:
                step = self._trainer.state.step if self._trainer else 0
                status = "failed" if error else "finished"
                events.emit("run_finished", step=step, seconds=time.perf_counter() - self._began, status=status)

    @property
    def rank(self) -> int:
        """This process's rank; print and plot on rank 0."""
        return self.mesh.rank

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.mesh.world

    @property
    def module(self) -> torch.nn.Module:
        """The module that is trained."""
        return self._of_job().replica.module

    @property
    def step_number(self) -> int:
        """Steps finished so far, those before a resume included."""
        return self._of_job().state.step

    def batches(self) -> Iterator[Any]:
        """This rank's batch of every step that is left; a list of them where the plan has several microbatches.

        It may be left early and called again: it goes on after the steps that were taken.
        """
        trainer = self._of_job()
        with trainer.batches() as batches:
            for local in batches:
                shown = local.micro[0].batch if len(local.micro) == 1 else [micro.batch for micro in local.micro]
                self._pending = (shown, local)
                yield shown
                if trainer.state.step >= trainer.job.steps:
                    return

    def step(self, batch: Any) -> StepResult:
        """Forward, backward, one synchronisation and one optimizer step. Every rank must call it equally often.

        `batch` is what `batches` gave (changed in place or not), or any batch of one's own.
        """
        trainer = self._of_job()
        shown, local = self._pending or (None, None)
        self._pending = None
        if local is None or batch is not shown:
            if self.mesh.plan.exact:
                raise JobError(
                    "with exact=true run.step takes only what run.batches gave: the logical shards are its own."
                )
            if self.mesh.plan.pipeline > 1:
                raise JobError(
                    "with a pipeline run.step takes only what run.batches gave: all stages need the same samples."
                )
            number = trainer.state.step
            stream = stream_seed(trainer.job.seed, number, self.mesh.rank)
            local = LocalStep(
                step=number, micro=[Micro(batch=batch, stream=stream, samples=[], shard=None)], wait_s=0.0
            )
        return trainer.step(local)

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the held-out samples, each counted once over all ranks; the same on every rank."""
        return self._of_job().evaluate()

    def save(self) -> None:
        """Write a checkpoint of this moment. Every rank must call it."""
        self._of_job().save()

    def prepare(self, model: torch.nn.Module, optimizer: Any, loader: Any) -> tuple[torch.nn.Module, Any, Any]:
        """Make an existing script's model, optimizer and DataLoader work on every rank; returns the three to use on.

        The model and the optimizer are the same objects: gradients are averaged over ranks when `backward` returns.
        The loader's batches are cut: its batch size stays the global one, so the curve does not depend on the number
        of ranks. Start the script with `shardwise train SCRIPT`.
        """
        self.context = context.current(self._plan)
        self.mesh = self.context.mesh
        self._adopted = Adopted(model, self.mesh)
        return model, optimizer, self._adopted.loader(loader)

    def print(self, *what: Any) -> None:
        """Print on rank 0 only."""
        if context.current(self._plan).mesh.rank == 0:
            print(*what, flush=True)

    def _chosen_plan(self) -> Plan:
        """The launcher's mesh, with what this session says of precision and exactness; an earlier session's cuts were
        those of another model."""
        plan = structs.replace(self.mesh.plan, blocks=(), stages=())
        if self._plan is not None:
            return self._plan
        if self.job is not None and plan.precision == "float32":
            return structs.replace(plan, precision=self.job.precision)
        return plan

    def _refuse_unplayed(self) -> None:
        if self.job is not None and (self.job.early_stop or self.job.log):
            raise JobError(
                "early_stop and log of a job are for shardwise train; in a session the loop is yours: "
                "call run.evaluate() and leave the loop, and write to your tracker there."
            )

    def _of_job(self) -> Trainer:
        if self._trainer is None:
            raise JobError("this session has no job. Give sw.session a job or a model, and use it in a with block.")
        return self._trainer

    def _open_folder(self) -> RunFolder | None:
        if self.context.run is not None or self._runs is None:
            return self.context.run
        opened = RunFolder.create(self._runs, name="session").path if self.mesh.rank == 0 else ""
        folder = RunFolder(Path(context.agree(self.mesh, str(opened))))
        lines = events.JsonLines(folder.events)
        self._stack.callback(lines.close)
        self._began = time.perf_counter()
        self._stack.enter_context(events.sink(lines))
        if self.mesh.rank == 0:
            folder.write_plan(self.mesh.plan, _here(), None)
            folder.publish()
            plan = str(self.mesh.plan)
            steps = self.job.steps if self.job else None
            events.emit(
                "run_started", run=folder.path.name, job="session", ranks=self.mesh.world, plan=plan, steps=steps
            )
            events.emit("connected", axes=self.mesh.axes())
        return folder


def session(
    job: TrainJob | None = None,
    *,
    model: torch.nn.Module | None = None,
    data: Any = None,
    loss: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    optimizer: torch.optim.Optimizer | Optimizer | Sequence[Optimizer] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    eval_data: Any = None,
    metrics: Metrics | None = None,
    global_batch: int = 32,
    epochs: float = 1.0,
    steps: int | None = None,
    plan: str | Plan | None = None,
    runs: str | Path | None = "runs",
    precision: Precision = "float32",
    seed: int = 0,
    clip_norm: float | None = None,
    batch_norm: Literal["sync", "local"] = "sync",
    **more: Any,
) -> Session:
    """A session for a `TrainJob`, or for an ordinary module, Dataset, loss and optimizer; or bare, for `prepare`.

    `loss` and each metric return `(sum, weight)`. `global_batch` counts the samples of all ranks together. `steps`
    defaults to `epochs` passes over `data`. `runs=None` keeps no record on disk. Raises JobError for what is missing.
    """
    chosen = build_plan(parse_plan(plan)) if isinstance(plan, str) else plan
    folder = Path(runs) if runs is not None else None
    if job is not None and model is not None:
        raise JobError("sw.session was given a job and a model. Give it one of them.")
    _refuse_unknown(more)
    if job is not None and (data, loss, optimizer, steps, more) != (None, None, None, None, {}):
        raise JobError("sw.session was given a job and parts of one. Change the job, or leave it out.")
    if job is not None or model is None:
        return Session(job, chosen, None, folder)
    if data is None or loss is None or optimizer is None:
        missing = [name for name, value in (("data", data), ("loss", loss), ("optimizer", optimizer)) if value is None]
        raise JobError(f"sw.session with a model also needs {' and '.join(missing)}.")
    described = _described(data, eval_data, collate)
    prepared = prepare_data(described, seed)
    built = TrainJob(
        model=lambda: model,
        loss=loss,
        data=described,
        optimizer=_spec(optimizer),
        metrics=metrics or {},
        global_batch=global_batch,
        steps=steps or _steps(prepared, global_batch, epochs),
        precision=precision,
        seed=seed,
        clip_norm=clip_norm,
        batch_norm=batch_norm,
        **more,
    )
    return Session(built, chosen, prepared, folder)


def _refuse_unknown(more: Mapping[str, Any]) -> None:
    for unknown in sorted(more.keys() - set(TrainJob.__struct_fields__)):
        raise JobError(f"sw.session has no argument '{unknown}'{did_you_mean(unknown, TrainJob.__struct_fields__)}")


def prepare_data(description: Any, seed: int) -> Prepared:
    """The samples of a description, outside of a job."""
    from shardwise.data.cache import cache_root

    prepared: Prepared = description.prepare(cache_root(), seed=seed)
    return prepared


def _described(data: Any, eval_data: Any, collate: Any) -> Any:
    if callable(getattr(data, "prepare", None)):
        return data
    return dataset(data, eval=eval_data, collate=collate)


def _spec(optimizer: Any) -> Any:
    if isinstance(optimizer, list | tuple) and any(isinstance(each, torch.optim.Optimizer) for each in optimizer):
        raise JobError(
            "sw.session takes one torch optimizer. Describe several: optimizer=[sw.adamw(params='*.bias'), ...]."
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        return Optimizer(
            optimizer=lambda _parameters, lr: optimizer, lr=optimizer.param_groups[0]["lr"], schedule="own"
        )
    return tuple(optimizer) if isinstance(optimizer, list) else optimizer


def _steps(prepared: Prepared, global_batch: int, epochs: float) -> int:
    if not hasattr(prepared.train, "__len__"):
        raise SpecError("steps of sw.session is needed: the data set does not say how many samples it has.")
    return max(1, math.ceil(len(prepared.train) * epochs / global_batch))


def _here() -> Any:
    from shardwise.cluster.discover import discover

    return discover(probe=False)
