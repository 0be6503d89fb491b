"""What a run must remember between steps, and how it is saved and resumed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch

from shardwise import events
from shardwise.checkpoint.load import latest, read_tensors
from shardwise.checkpoint.manifest import Manifest
from shardwise.checkpoint.resume import resume
from shardwise.checkpoint.save import save
from shardwise.checkpoint.scalars import pack, unpack
from shardwise.checkpoint.state import collect, global_shapes, merge
from shardwise.checkpoint.store import LocalStore, MemoryStore, Store
from shardwise.comm.collectives import gather_bytes
from shardwise.comm.mesh import Mesh
from shardwise.parallel.parallelize import Replica
from shardwise.parallel.synchronise import KeptByAll
from shardwise.spec.job import TrainJob
from shardwise.train.folder import RunFolder
from shardwise.train.optimizers import Optimizers

ROW, COMMON = "sync", "outer"  # in a checkpoint: what the replicas keep each for itself, and alike


class State(msgspec.Struct, kw_only=True):
    """Steps finished, the last loss, and the evaluations so far. `saved` is the step of the newest checkpoint."""

    step: int = 0
    loss: float = float("nan")
    evaluations: list[dict[str, float]] = msgspec.field(default_factory=list)
    saved: int = -1

    def best_step(self, job: TrainJob) -> int:
        """The step whose evaluation is best by the job's early-stop metric (else by loss); -1 when there is none."""
        rule = job.early_stop
        metric, sign = (rule.metric, 1 if rule.better == "lower" else -1) if rule else ("loss", 1)
        if not self.evaluations:
            return -1
        return int(min(self.evaluations, key=lambda e: (math.isnan(e[metric]), sign * e[metric]))["step"])


class Saver:
    """Checkpoints of one run on this rank; in memory only when the run has no folder."""

    def __init__(self, folder: RunFolder | None, mesh: Mesh, job: TrainJob, *, number: int = 1) -> None:
        place = folder.checkpoints if folder else None
        if place is not None and number > 1:  # a script's second session is not the first one going on
            place = place.with_name(f"{place.name}-{number}")
        self.store: Store = LocalStore(place) if place else MemoryStore()
        self.kept = folder is not None
        self.scratch = folder.path if folder else None
        self.mesh = mesh
        self.job = job

    def resume(self, replica: Replica, optimizers: Optimizers) -> State:
        """The newest whole checkpoint, put into the replica and the optimizers; a fresh State when there is none."""
        with replica.updates.shown(optimizers.optimizers):
            found = resume(
                self.store,
                replica.module,
                optimizers.optimizers,
                plan=self.mesh.plan,
                rank=self.mesh.rank,
                agree=self._all,
                empty=replica.updates.empty,
            )
        if found is None:
            return State()
        replica.synchroniser.loaded()
        if found.manifest.plan.states != self.mesh.plan.states:
            replica.updates.widen(optimizers.optimizers)
        replica.load_state(found.scalars["replica"])
        self._take(found.manifest, found.scalars, replica, optimizers)
        state = State(
            step=found.step, loss=found.scalars["loss"], evaluations=found.scalars["evaluations"], saved=found.step
        )
        if self.mesh.rank == 0:
            path = self.store.where(found.manifest.folder)
            events.emit("resumed", step=state.step, path=path, from_ranks=found.manifest.plan.ranks)
        return state

    def save(self, replica: Replica, optimizers: Optimizers, state: State, *, best: bool) -> None:
        """Write a checkpoint together with all other ranks. Raises CheckpointError on all when one could not."""
        if not self.kept:
            return
        replica.sync_buffers()
        kept = replica.synchroniser.keep(optimizers.optimizers)
        mine: dict[str, Any] = {"replica": replica.state(), "loss": state.loss, "evaluations": state.evaluations}
        rows = {f"{ROW}/{name}": tensor.clone()[None] for name, tensor in kept.rows.items()}
        held = optimizers.optimizers
        with replica.synchroniser.consistent(held), replica.updates.shown(held):
            plan, rank = self.mesh.plan, self.mesh.rank
            tensors, scalars = collect(replica.module, optimizers.optimizers, plan=plan, rank=rank)
            scalars = self._of_all_stages(scalars)
            save(
                self.store,
                step=state.step,
                tensors={**tensors, **rows, **{f"{COMMON}/{name}": t for name, t in kept.common.items()}},
                scalars={**scalars, **mine, "sync": kept.plain},
                plan=plan,
                rank=rank,
                world=self.mesh.world,
                barrier=self._barrier,
                keep_last=self.job.keep_last,
                best=best,
                shapes={
                    **global_shapes(tensors, replica.shapes, plan, rank),
                    **{name: (self.mesh.world, *tensor.shape[1:]) for name, tensor in rows.items()},
                },
            )
        state.saved = state.step

    def _take(self, manifest: Manifest, scalars: dict[str, Any], replica: Replica, optimizers: Optimizers) -> None:
        """What the word of synchronisation kept; another word begins anew from the parameters."""
        before, now = manifest.plan.sync, self.mesh.plan.sync
        if (before.word, before.method) != (now.word, now.method):
            return
        kinds = (f"{ROW}/", f"{COMMON}/")
        found = read_tensors(self.store, manifest, kinds)
        rows, common = (
            {name.removeprefix(kind): tensor for name, tensor in found.items() if name.startswith(kind)}
            for kind in kinds
        )
        plain = {"steps": manifest.step, **scalars.get("sync", {})}
        replica.synchroniser.take(KeptByAll(rows, common, plain), self.mesh.rank, optimizers.optimizers)

    def _of_all_stages(self, scalars: dict[str, Any]) -> dict[str, Any]:
        group = self.mesh.axis("pipeline").group
        if group is None:
            return scalars
        raw = gather_bytes(msgspec.json.encode(pack(scalars)), group, self.mesh.device)
        return merge([unpack(msgspec.json.decode(each)) for each in raw], self.mesh.plan)

    def last_good(self) -> str:
        """Where the newest checkpoint is, or an empty string."""
        found = latest(self.store)
        return self.store.where(found.folder) if found else ""

    def _barrier(self) -> None:
        if self.mesh.world > 1:
            torch.distributed.barrier()

    def _all(self, whole: bool) -> bool:
        if self.mesh.world == 1:
            return whole
        vote = torch.tensor([int(whole)], device=self.mesh.device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
        return bool(vote.item())
