"""`shardwise runs`: the runs in a folder, the newest first."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.options import Runs

Last = Annotated[int, typer.Option("--last", "-n", min=1, metavar="N", help="Show only so many.")]


def runs(runs: Runs = Path("runs"), last: Last = 20) -> None:
    """List the runs, the newest first."""
    from shardwise.cli.console import print_table
    from shardwise.observe.runs import list_runs
    from shardwise.observe.text import figure

    found = list_runs(runs)
    if not found:
        typer.echo(f"no runs in {runs}/ yet. Start one with: shardwise train FILE")
        return
    rows = []
    for line in found[:last]:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(line.started)) if line.started is not None else "-"
        rows.append(
            (line.name, line.status, started, str(line.step), figure(line.loss), line.plan or "-", line.job or "-")
        )
    print_table(("run", "status", "started", "steps", "loss", "plan", "job"), rows)
    if len(found) > last:
        typer.echo(f"and {len(found) - last} older ones; -n N shows more")
