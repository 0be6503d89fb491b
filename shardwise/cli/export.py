"""`shardwise export RUN --to FORMAT`: a run's weights for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.options import Checkpoint, RunName, Runs

To = Annotated[str, typer.Option("--to", metavar="FORMAT", help="safetensors, dcp or transformers.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="PATH", help="Default: export/FORMAT in the run's folder.")]


def export(
    run: RunName = "latest",
    to: To = "safetensors",
    out: Out = None,
    checkpoint: Checkpoint = "latest",
    runs: Runs = Path("runs"),
) -> None:
    """Write a run's weights in another format."""
    from shardwise.errors import SpecError, did_you_mean
    from shardwise.observe.runs import find_run
    from shardwise.train import api

    folder = find_run(run, runs)
    known = ("safetensors", "dcp", "transformers")
    if to not in known:
        raise SpecError(f"--to {to} is not a format to export to{did_you_mean(to, known)}")
    written = api.export(folder, to=to, out=out or folder / "export" / to, checkpoint=checkpoint, runs=runs)  # type: ignore[arg-type]
    typer.echo(written)
