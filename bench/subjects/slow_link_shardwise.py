"""The job of `slow_link` in a `sw.session`, with the plan of the case."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import shardwise as sw
from bench import work
from bench.jobs.token_file import TokenFile
from bench.line import serve
from bench.slow_case import HELD, SlowCase
from shardwise import events


def job(case: SlowCase) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: work.model(case),
        loss=sw.next_token_loss,
        data=TokenFile(Path(case.folder) / "tokens.bin", case.context, Path(case.folder) / HELD),
        optimizer=sw.adamw(
            lr=case.lr,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            warmup=case.warmup,
            schedule="cosine",
            final=case.final,
        ),
        global_batch=case.global_batch,
        steps=case.steps,
        seed=case.seed,
        save_every=0,
        allow=tuple(case.settings["allow"]),
    )


def main() -> None:
    case = SlowCase.from_environment()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    told: dict[str, events.Event] = {}

    def hear(event: events.Event) -> None:
        """What `sync=auto` says of its choice."""
        if event["event"] in ("sync_chosen", "sync_given_up"):
            told[event["event"]] = event

    with events.sink(hear), sw.session(job(case), plan=case.settings["plan"], runs=None) as run:
        batches = run.batches()

        def step() -> float:
            return run.step(next(batches)).loss

        serve(
            step,
            rank=rank,
            world=world,
            checksum=lambda: work.checksum(run.module),
            evaluate=lambda: run.evaluate()["loss"],  # of what the replicas agree on
            tell=lambda: told,
        )


if __name__ == "__main__":
    main()
