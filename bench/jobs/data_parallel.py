"""The case of `data_parallel` as a job: what `shardwise train` runs while the harness asks for its steps."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import shardwise as sw
from bench import work
from bench.case import Case
from bench.jobs.token_file import TokenFile
from bench.served import Served


def job() -> sw.TrainJob:
    case = Case.from_environment()
    made: list[nn.Module] = []

    def model() -> nn.Module:
        made[:] = [work.model(case)]
        return made[0]

    served = Served(lambda: work.checksum(made[0]))
    return sw.TrainJob(
        model=model,
        loss=sw.next_token_loss,
        data=TokenFile(Path(case.folder) / "tokens.bin", case.context),
        optimizer=sw.adamw(lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1),
        global_batch=case.global_batch,
        steps=10**9,
        seed=case.seed,
        precision="float32" if case.precision == "float32" else "bfloat16",
        callbacks=(served,),
        save_every=0,  # the peers save nothing either
        allow=("param_server",),
    )
