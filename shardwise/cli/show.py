"""`shardwise show RUN`: the summary of a run, and its report.html."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.options import RunName, Runs

Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead.")]
To = Annotated[
    str | None, typer.Option("--to", metavar="TRACKER", help="Send its events to tensorboard, wandb or mlflow.")
]


def show(run: RunName = "latest", runs: Runs = Path("runs"), json: Json = False, to: To = None) -> None:
    """Sum up a run, and write its report.html."""
    from shardwise.observe import report, summary, trackers
    from shardwise.observe.runs import find_run

    folder = find_run(run, runs)
    found = summary.read(folder, now=time.time())
    if json:
        import msgspec

        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        return
    from shardwise.cli.console import print_topics
    from shardwise.observe.text import summary_text

    print_topics(summary_text(found, blocks=True).splitlines())
    print_topics(["", f"report      {report.write_report(folder, now=time.time())}"])
    if to:
        print_topics([f"sent        {trackers.replay(folder, to)} events to {to}"])
