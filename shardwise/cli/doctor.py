"""`shardwise doctor`: what this machine has, what is missing, and the command that installs it.

The exit code is 1 if something needed is missing.
"""

from __future__ import annotations

from pathlib import Path

import typer

from shardwise.cli.options import Runs


def doctor(runs: Runs = Path("runs")) -> None:
    """Tell what this machine has and what is missing."""
    from shardwise.cli.console import print_table
    from shardwise.observe.doctor import cache_folder, examine, healthy

    findings = examine(runs=runs, cache=cache_folder())
    print_table((), [(line.verdict, line.topic, line.said, line.fix) for line in findings])
    good = healthy(findings)
    typer.echo("everything needed is here" if good else "something needed is missing: see the lines marked missing")
    raise typer.Exit(0 if good else 1)
