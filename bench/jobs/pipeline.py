"""The case of `pipeline` as a job: what `shardwise train --plan pipeline=2` runs while the harness asks for steps."""

from __future__ import annotations

import shardwise as sw
from bench import staged
from bench.jobs.plain import plain


def job() -> sw.TrainJob:
    return plain(staged.whole)
