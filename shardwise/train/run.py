"""`train`: run a job on this rank as the plan says, from the last checkpoint to the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence, Sized
from pathlib import Path

from msgspec import structs

from shardwise import events
from shardwise.comm.mesh import Mesh
from shardwise.data.loader import PREFETCH, Batches, LocalStep, eval_batches, open_batches
from shardwise.data.order import sample_indices
from shardwise.data.source import Prepared
from shardwise.errors import NonFiniteLoss, SpecError, did_you_mean
from shardwise.models.partial import Built, build_part, copy_without_memory
from shardwise.parallel.blame import name_of, user_code
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.sharded import built_by_rows
from shardwise.parallel.step import StepResult, evaluate, step
from shardwise.plan.search import filling
from shardwise.plan.stages import chain, with_stages
from shardwise.spec.job import TrainJob
from shardwise.spec.layout import Box, Shape, boxes
from shardwise.spec.plan import Plan
from shardwise.train.memory import peak_bytes
from shardwise.train.optimizers import Optimizers
from shardwise.train.probe import profile_job
from shardwise.train.splits import split_here
from shardwise.train.state import Saver, State
from shardwise.train.timeline import recorded_steps, timed


class Trainer:
    """A job on one rank: its replica, optimizers, batches and checkpoints, and what happens around each step."""

    def __init__(self, job: TrainJob, plan: Plan, mesh: Mesh, prepared: Prepared, saver: Saver) -> None:
        self.job = job
        if plan.pipeline > 1 and not plan.stages:
            plan = mesh.plan = cut_here(job, plan, prepared)
        if plan.tensor > 1:
            plan = mesh.plan = split_here(job, plan, mesh, prepared)
        self.plan = plan
        self.mesh = mesh
        self.prepared = prepared
        self.saver = saver
        self.replica = build_replica(job, plan, mesh, scratch=saver.scratch)
        self.optimizers = Optimizers(self.replica.module, job)
        self.state = saver.resume(self.replica, self.optimizers)
        ahead = PREFETCH * plan.microbatches + job.workers
        self.replica.synchroniser.begin(self.state.step, self.optimizers.schedule, ahead)
        _check_early_stop(job, prepared)
        self._timed = recorded_steps(self.state.step + 1, job.steps)
        self._batches: Batches | None = None
        self._mark = time.perf_counter()

    def batches(self) -> Batches:
        """This rank's share of every step that is left, from the current one on."""
        self._close_batches()
        self._batches = open_batches(
            self.prepared.train,
            global_batch=self.job.global_batch,
            seed=self.job.seed,
            rank=self.mesh.axis("batch").rank,
            ranks=self.mesh.axis("batch").size,
            start_step=self.state.step,
            steps=self.job.steps,
            logical_shards=self.job.logical_shards if self.plan.exact else None,
            microbatches=self.plan.microbatches,
            workers=self.job.workers,
            share=self.replica.synchroniser.hands(self.job.global_batch, least=min(1, self.job.workers)),
        )
        return self._batches

    def train(self) -> State:
        """All steps that are left. Raises NonFiniteLoss with the step, its samples and the last good checkpoint."""
        events.emit("training", step=self.state.step, steps=self.job.steps)
        self._mark = time.perf_counter()
        with self.batches() as batches:
            for local in batches:
                self.step(local)
                if self._stop_early() or self.state.step >= self.job.steps:
                    break
        self.finish()
        return self.state

    def step(self, local: LocalStep) -> StepResult:
        """One optimizer step on this rank's share of a batch, and what the job wants done after it."""
        sets_rates = self.replica.synchroniser.schedules
        rate = self.optimizers.rate(local.step) if sets_rates else self.optimizers.schedule(local.step)
        with timed(self.mesh, local.step + 1, wanted=local.step + 1 in self._timed):
            result = self._guarded(local)
        self.state.step, self.state.loss = local.step + 1, result.loss
        now = time.perf_counter()
        self._report(local, result, rate, now - self._mark)
        for callback in self.job.callbacks:
            with user_code(f"the callback {name_of(callback)}"):
                callback(self.state, result)
        due = bool(self.job.save_every and self.state.step % self.job.save_every == 0)
        if self.job.eval_every and self.state.step % self.job.eval_every == 0 and self.evaluate():
            due = due or self.state.best_step(self.job) == self.state.step  # the best must not be lost
        if due:
            self.save()
        self._mark = time.perf_counter()  # evaluating and saving are no part of the next step
        return result

    def finish(self) -> None:
        """The last checkpoint, and what this rank's memory was at its peak. All ranks agree from here on."""
        if self.state.saved != self.state.step:
            self.save()
        self.replica.synchroniser.settle(self.optimizers.optimizers)
        self.mesh.traffic()  # soon the others close their ends of the connections, which know what was sent
        events.emit("memory", rank=self.mesh.rank, peak_bytes=peak_bytes(str(self.mesh.device)))

    def _guarded(self, local: LocalStep) -> StepResult:
        try:
            return step(
                self.replica,
                self.optimizers.optimizers,
                local.micro,
                loss=self.job.loss,
                forward=self.job.forward,
                clip_norm=self.job.clip_norm,
                on_nan=self.job.on_nan,
            )
        except NonFiniteLoss as error:
            samples = self._samples(local)
            events.emit("non_finite", step=local.step + 1, rank=self.mesh.rank, samples=samples, why=str(error))
            last = self.saver.last_good()
            kept = f"The last good checkpoint is {last}" if last else "No checkpoint was written yet"
            shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
            raise NonFiniteLoss(
                f"step {local.step + 1}: {error} The samples of this step: {shown or 'unknown'}. {kept}. Lower "
                "the learning rate, set clip_norm, or let such steps be skipped with on_nan='skip' in the job."
            ) from None

    def _samples(self, local: LocalStep) -> list[int]:
        """The indices of the samples of the whole step, or of this rank's where only they are known."""
        mine = [sample for micro in local.micro for sample in micro.samples]
        if not mine or not isinstance(self.prepared.train, Sized):
            return mine
        first = local.step * self.job.global_batch
        positions = range(first, first + self.job.global_batch)
        return [int(i) for i in sample_indices(positions, len(self.prepared.train), self.job.seed)]

    def _report(self, local: LocalStep, result: StepResult, rate: float, seconds: float) -> None:
        if self.mesh.rank != 0:
            return
        events.emit(
            "step",
            step=self.state.step,
            loss=result.loss,
            lr=rate,
            samples=self.job.global_batch,
            weight=result.weight,
            tokens=result.weight if "tokens" in self.prepared.facts else None,
            seconds=seconds,
            compute_s=result.compute_s,
            comm_s=result.comm_s,
            optimizer_s=result.optimizer_s,
            wait_s=local.wait_s,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
        )

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the held-out samples, the same on every rank; kept for early stop and `best`."""
        if self.prepared.eval is None:
            return {}
        began = time.perf_counter()
        with self.replica.synchroniser.consistent():
            found = evaluate_replica(self.replica, self.prepared, self.job)
        if "tokens" in self.prepared.facts:
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        self.state.evaluations.append({"step": self.state.step, **found})
        if self.mesh.rank == 0:
            events.emit("evaluation", step=self.state.step, seconds=time.perf_counter() - began, **found)
        return found

    def save(self) -> None:
        """A checkpoint of this moment."""
        best = self.state.best_step(self.job) == self.state.step
        self.saver.save(self.replica, self.optimizers, self.state, best=best)

    def _stop_early(self) -> bool:
        rule = self.job.early_stop
        if rule is None or not self.state.evaluations or self.state.evaluations[-1]["step"] != self.state.step:
            return False
        best = self.state.best_step(self.job)
        later = [e for e in self.state.evaluations if e["step"] > best]
        if len(later) < rule.patience:
            return False
        if self.mesh.rank == 0:
            events.emit("early_stop", step=self.state.step, metric=rule.metric, best_step=best)
        return True

    def gather(self) -> None:
        """The module is whole on every rank. All ranks call it, at the end."""
        self.replica.gather()

    def close(self) -> None:
        """Give the module back as it was, and end what makes batches ahead."""
        self._close_batches()
        self.replica.close()

    def _close_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()


def _check_early_stop(job: TrainJob, prepared: Prepared) -> None:
    rule = job.early_stop
    if rule is None:
        return
    if prepared.eval is None or not job.eval_every:
        raise SpecError("early_stop of the job needs held-out data and eval_every, the steps between two evaluations.")
    known = {"loss", "perplexity", *job.metrics}
    if rule.metric not in known:
        raise SpecError(
            f"early_stop.metric='{rule.metric}' of the job is not evaluated{did_you_mean(rule.metric, known)}"
        )


def cut_here(job: TrainJob, plan: Plan, prepared: Prepared) -> Plan:
    """The plan with stages where nobody has cut the model before; the same on every rank."""
    # a copy, since it may be the user's own module
    copied = structs.replace(job, model=lambda: copy_without_memory(build_part(job.model, lambda *_: ()).module))
    profile = profile_job(copied, prepared, cuts=True)
    if plan.microbatches == 1 and not profile.batch_norms:
        most = max(1, job.global_batch // plan.replicas)
        plan = structs.replace(plan, microbatches=min(most, filling(plan)))
    calls = chain(profile)
    return with_stages(plan, profile, lambda stage, first, last: calls.forward_flops(first, last))


def build_replica(job: TrainJob, plan: Plan, mesh: Mesh, *, scratch: Path | None = None) -> Replica:
    """The job's module, with one process's values, obeying the plan; `scratch` is a folder for what is offloaded."""
    import torch

    torch.manual_seed(job.seed)
    with user_code("model of the job"):
        if plan.pipeline > 1 or plan.tensor > 1 or built_by_rows(plan):
            built = build_part(job.model, lambda name, shape: _part(name, shape, plan, mesh.rank))
        else:
            built = Built(job.model(), by_part=False)
    return parallelize(
        built.module,
        plan,
        mesh,
        batch_norm=job.batch_norm,
        coupled=job.coupled,
        compile=job.compile,
        logical_shards=job.logical_shards,
        allow=job.allow,
        scratch=scratch,
        by_part=built.by_part,
    )


def _part(name: str, shape: Shape, plan: Plan, rank: int) -> Sequence[Box]:
    """What a rank builds of a parameter: its part of what its stages have, and of that its rows where it keeps no
    more."""
    cut = plan if built_by_rows(plan) else structs.replace(plan, zero=1, parameters="float32", master="float32")
    return boxes(f"model/{name}", shape, cut, rank)


def evaluate_replica(replica: Replica, prepared: Prepared, job: TrainJob) -> dict[str, float]:
    """Loss and metrics over all held-out samples, each counted once whatever the number of ranks."""
    assert prepared.eval is not None
    axis = replica.mesh.axis("batch")
    batches = eval_batches(prepared.eval, batch=job.global_batch, rank=axis.rank, ranks=axis.size, workers=job.workers)
    return evaluate(replica, batches, job.loss, job.metrics, job.forward)
