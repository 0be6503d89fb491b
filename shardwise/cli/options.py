"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[str, typer.Argument(metavar="FILE", help="A job file, FILE:FUNCTION, or a plain script.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run: its folder, its name, or latest.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the job function.")]
PlanText = Annotated[str | None, typer.Option("--plan", metavar="PLAN", help="Such as data=2,precision=bfloat16.")]
Machines = Annotated[str | None, typer.Option("--cluster", metavar="CLUSTER", help="Plan for these machines instead.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The folder that holds the runs.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", metavar="WHICH", help="latest, best, or a step.")]
