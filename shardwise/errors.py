"""Every error a user can cause, in one tree. A message says what, why and what to do; a traceback means our bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShardwiseError(Exception):
    """Base of all errors that the command line prints without a traceback. `exit_code` is the process's exit status."""

    exit_code = 1


class SpecError(ShardwiseError):
    """A plan, cluster or job field has a value that it may not have."""

    exit_code = 2


class JobError(ShardwiseError):
    """The user's job file, model, loss, metric or callback failed."""

    exit_code = 3


class DataError(ShardwiseError):
    """The data set is missing, empty, unreadable or does not fit the job."""

    exit_code = 4


class NoPlanFits(ShardwiseError):
    """No plan runs this job on this cluster."""

    exit_code = 5


class ClusterError(ShardwiseError):
    """A device, process or launcher failed or is not there."""

    exit_code = 6


class CheckpointError(ShardwiseError):
    """A checkpoint is unreadable, altered, or belongs to another model."""

    exit_code = 7


class RunError(ShardwiseError):
    """The run folder cannot be written, found or resumed."""

    exit_code = 8


class NonFiniteLoss(ShardwiseError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 9


class CommError(ShardwiseError):
    """A collective failed, waited too long, or its ranks disagreed."""

    exit_code = 10


class MissingPackage(ShardwiseError):
    """An optional package is not installed; the message has the command that installs it."""

    exit_code = 11


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'tensor'?` for the nearest of `choices`, or the list of them when none is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}." if known else "."
