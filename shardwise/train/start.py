"""Start the zygote first of all, so that its `import torch` overlaps with the command line's own work."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.cluster.local import Zygote
from shardwise.cluster.process import Starter

# Everything that a rank needs, imported once in the zygote and shared by every fork of it.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch._dynamo",  # profiling and the first optimizer import it, a second in every process that has not got it
    "shardwise.train.worker",
    "shardwise.train.probe",
    "shardwise.models.gpt",
)

_started: Starter | None = None  # one command starts one zygote; `take` hands it over


def early(argv: Sequence[str]) -> None:
    """Start the zygote if this command line will need one. Costs a fork and an exec, nothing else."""
    global _started
    if not {"--help", "-h", "env", "--on=env"} & set(argv) and _started is None:
        _started = Zygote.start(PRELOAD)


def take() -> Starter:
    """The zygote of this process, started now if `early` was not called; the caller closes it."""
    global _started
    zygote, _started = _started or Zygote.start(PRELOAD), None
    return zygote
