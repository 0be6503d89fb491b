"""`shardwise sample RUN PROMPT`: let a trained language model go on with a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.options import Checkpoint, RunName, Runs

Prompt = Annotated[str, typer.Argument(help="The text to go on with.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="How many to add at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Choose among so many likeliest tokens; 0: among all.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")]


def sample(
    run: RunName = "latest",
    prompt: Prompt = "",
    tokens: Tokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    seed: Seed = 0,
    checkpoint: Checkpoint = "latest",
    runs: Runs = Path("runs"),
) -> None:
    """Print a prompt and what the run's model goes on with."""
    from shardwise.train import api

    told = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "seed": seed, "checkpoint": checkpoint}
    pieces = iter(api.sample(run, prompt, runs=runs, **told))
    sys.stdout.write(prompt + next(pieces, ""))  # together: a run that is not there prints nothing
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
