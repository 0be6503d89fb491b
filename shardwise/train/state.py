"""What a run must remember between steps, and how it is saved and resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from shardwise import events
from shardwise.checkpoint.load import load, newest_whole
from shardwise.checkpoint.save import save
from shardwise.checkpoint.state import Snapshot
from shardwise.checkpoint.store import Store
from shardwise.comm.mesh import Mesh
from shardwise.errors import CheckpointError
from shardwise.parallel.parallelize import Replica
from shardwise.spec.job import TrainJob
from shardwise.train.optimizers import Optimizers


class State(msgspec.Struct, kw_only=True):
    """Steps finished, the last loss, and the evaluations so far. `saved` is the step of the newest checkpoint."""

    step: int = 0
    loss: float = float("nan")
    evaluations: list[dict[str, float]] = msgspec.field(default_factory=list)
    saved: int = -1

    def best_step(self, job: TrainJob) -> int:
        """The step whose evaluation is best by the job's early-stop metric (else by loss); 0 when there is none."""
        rule = job.early_stop
        metric, sign = (rule.metric, 1 if rule.better == "lower" else -1) if rule else ("loss", 1)
        if not self.evaluations:
            return 0
        if metric not in self.evaluations[0]:
            known = ", ".join(sorted(self.evaluations[0]))
            raise CheckpointError(f"early_stop.metric='{metric}' of the job is not evaluated; known: {known}.")
        return int(min(self.evaluations, key=lambda e: sign * e[metric])["step"])
