"""`shardwise verify FILE --plan ...`: the split computes what one device computes."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.cli.options import JobFile, PlanText, Sets


def verify(
    file: JobFile,
    sets: Sets = None,
    plan: PlanText = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to compare.")] = 3,
) -> None:
    """Compare a plan with one device on a small copy."""
    from shardwise.train import api

    report = api.verify(file, sets=sets or [], plan=plan, steps=steps)
    typer.echo(report.text())
    if not report.same:
        raise typer.Exit(1)
