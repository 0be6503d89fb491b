"""The case of `data_parallel` as a job: what `shardwise train` runs while the harness asks for its steps."""

from __future__ import annotations

from torch import nn

import shardwise as sw
from bench import work
from bench.case import Case
from bench.jobs.plain import plain


def job() -> sw.TrainJob:
    made: list[nn.Module] = []

    def model(case: Case) -> nn.Module:
        made[:] = [work.model(case)]
        return made[0]

    precision = "float32" if Case.from_environment().precision == "float32" else "bfloat16"
    return plain(model, lambda: work.checksum(made[0]), precision=precision, allow=("param_server",))
