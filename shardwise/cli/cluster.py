"""`shardwise cluster calibrate`: measure what the ranks of a cluster reach between each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.train import On

Ranks = Annotated[int | None, typer.Option("--ranks", min=1, metavar="N", help="Default: one a device.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write a cluster file too, for --cluster.")]


def cluster() -> None:
    """Measure machines and the links between them."""


def calibrate(ranks: Ranks = None, on: On = "local", out: Out = None) -> None:
    """Measure links and collectives between ranks."""
    from shardwise.train.calibrate import calibrate as measure

    found = measure(ranks=ranks, on=on, out=out)  # type: ignore[arg-type]
    if found is None:
        return
    from shardwise.cli.console import print_table, print_topics
    from shardwise.observe.matrix import collectives_table, matrices

    calibration = found.cluster.calibrations[0]
    hosts = len(found.cluster.nodes)
    where = f"{calibration.ranks} ranks on {hosts} host{'s' if hosts > 1 else ''}"
    print_topics([f"measured    {where} over {calibration.backend}, in {found.seconds:.1f} s"])
    for table in (*matrices(calibration), collectives_table(calibration)):
        print_topics(["", table.title])
        print_table(table.head, table.rows)
    print_topics([""] + [f"saved       {path}" for path in found.written])
    print_topics(["            plan and train on this machine use it"] if hosts == 1 else [])
