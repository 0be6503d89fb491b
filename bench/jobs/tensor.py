"""The case of `tensor` as a job: what `shardwise train --plan tensor=2` runs while the harness asks for steps."""

from __future__ import annotations

import shardwise as sw
from bench import decoder
from bench.jobs.plain import plain


def job() -> sw.TrainJob:
    return plain(decoder.model)
