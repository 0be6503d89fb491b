"""All verbs as one typer application."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.cli import cluster, doctor, evaluate, export, new, plan, runs, sample, show, train, verify

HELP = "Train any PyTorch module on whatever machines there are: job + cluster -> plan -> run -> checkpoint."
VERBS = (
    plan.plan,
    verify.verify,
    train.train,
    show.show,
    runs.runs,
    sample.sample,
    evaluate.evaluate,
    export.export,
    new.new,
    doctor.doctor,
)
GROUPS = {cluster.cluster: (cluster.calibrate,)}  # words that take a verb of their own


def build() -> typer.Typer:
    """The application. Plain help and errors: they are faster, and the same in a log as on a terminal."""
    app = typer.Typer(
        help=HELP,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_top)
    for verb in VERBS:
        app.command(verb.__name__)(verb)
    for group, verbs in GROUPS.items():
        inner = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
        inner.callback()(group)
        for each in verbs:
            inner.command(each.__name__)(each)
        app.add_typer(inner, name=group.__name__)
    return app


def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from shardwise import __version__

        typer.echo(f"shardwise {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
