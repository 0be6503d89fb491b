"""The job's data, prepared once and opened by every rank."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from shardwise.data.cache import cache_root
from shardwise.data.source import Prepared
from shardwise.errors import DataError, JobError
from shardwise.spec.job import TrainJob


def prepare(job: TrainJob) -> Prepared:
    """The job's train and evaluation samples. The heavy part is done once; later calls open the cache."""
    description: Any = job.data
    if not callable(getattr(description, "prepare", None)):
        raise JobError(
            f"data of the job is a {type(description).__name__}. Describe it with sw.text, sw.images, sw.arrays or "
            "sw.dataset; sw.dataset takes any PyTorch Dataset."
        )
    prepared: Prepared = description.prepare(cache_root(), seed=job.seed)
    if isinstance(prepared.train, Sized) and len(prepared.train) < 1:
        raise DataError("data of the job has no sample to train on. Give it more data, or a shorter context.")
    return prepared
