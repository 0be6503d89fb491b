"""The case of `startup` as a job: one step, and the moment of its end."""

from __future__ import annotations

import os
from pathlib import Path

import shardwise as sw
from bench import work
from bench.case import Case
from bench.jobs.token_file import TokenFile
from bench.stamp import stamp


def job() -> sw.TrainJob:
    case = Case.from_environment()
    return sw.TrainJob(
        model=lambda: work.model(case),
        loss=sw.next_token_loss,
        data=TokenFile(Path(case.folder) / "tokens.bin", case.context),
        optimizer=sw.adamw(lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1),
        global_batch=case.global_batch,
        steps=1,
        seed=case.seed,
        callbacks=(lambda state, result: stamp(int(os.environ.get("RANK", "0"))),),
    )
