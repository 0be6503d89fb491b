"""`shardwise train FILE`: run a job here, show it while it goes on, and sum it up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli.options import JobFile, Machines, PlanText, Runs, Sets

On = Annotated[str, typer.Option("--on", metavar="WHERE", help="local, or env: under torchrun, Slurm or MPI.")]
Resume = Annotated[str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run; latest is one too.")]
Name = Annotated[str | None, typer.Option("--name", help="What the run's folder is called, after its date.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Words = Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of a plain script, after --.")]


def train(
    file: JobFile,
    args: Words = None,
    sets: Sets = None,
    plan: PlanText = None,
    cluster: Machines = None,
    on: On = "local",
    resume: Resume = None,
    runs: Runs = Path("runs"),
    name: Name = None,
    quiet: Quiet = False,
) -> None:
    """Train a job, or run a plain script in every rank."""
    from shardwise.train import api

    told: dict[str, Any] = {"on": on, "resume": resume, "runs": runs, "name": name, "args": args or []}
    result = api.train(file, sets=sets or [], plan=plan, cluster=cluster, display=not quiet, **told)
    if not quiet and result.summary.step:
        from shardwise.cli.console import print_topics
        from shardwise.observe.text import outcome_lines

        print_topics(["", *outcome_lines(result.summary, blocks=True), "", f"shardwise show {result.path}"])
    raise typer.Exit(result.exit_code)
