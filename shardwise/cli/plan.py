"""`shardwise plan FILE`: what would happen here, and why."""

from __future__ import annotations

import typer

from shardwise.cli.options import JobFile, Machines, PlanText, Sets


def plan(file: JobFile, sets: Sets = None, plan: PlanText = None, cluster: Machines = None) -> None:
    """Show how a job would be split here, and its cost."""
    from shardwise.train import api

    report = api.plan(file, sets=sets or [], plan=plan, cluster=cluster)
    typer.echo(report.text())
