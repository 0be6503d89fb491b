"""A case as a job, for every benchmark that runs `shardwise train` while the harness asks for steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import shardwise as sw
from bench.case import Case
from bench.jobs.token_file import TokenFile
from bench.served import Served


def plain(model: Callable[[Case], nn.Module], checksum: Callable[[], float] = lambda: 0.0, **more: Any) -> sw.TrainJob:
    """The case of the environment, with a model of it; `more` are further fields of the job."""
    case = Case.from_environment()
    return sw.TrainJob(
        model=lambda: model(case),
        loss=sw.next_token_loss,
        data=TokenFile(Path(case.folder) / "tokens.bin", case.context),
        optimizer=sw.adamw(lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1),
        global_batch=case.global_batch,
        steps=10**9,
        seed=case.seed,
        callbacks=(Served(checksum),),
        save_every=0,  # the peers save nothing either
        **more,
    )
