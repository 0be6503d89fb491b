"""`shardwise evaluate RUN`: loss and metrics of a checkpoint on the held-out data."""

from __future__ import annotations

from pathlib import Path

from shardwise.cli.options import Checkpoint, RunName, Runs


def evaluate(run: RunName = "latest", checkpoint: Checkpoint = "latest", runs: Runs = Path("runs")) -> None:
    """Evaluate a checkpoint on the job's held-out data."""
    from shardwise.cli.console import print_table
    from shardwise.train import api

    found = api.evaluate(run, checkpoint=checkpoint, runs=runs)
    print_table(("metric", "value"), [(name, f"{value:.6g}") for name, value in found.items()])
