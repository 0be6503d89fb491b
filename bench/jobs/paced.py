"""A small GPT whose steps take as long as the pace says: every worker sleeps for its samples, one of them longer."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import shardwise as sw
from bench import work
from bench.case import Case
from bench.jobs.token_file import TokenFile
from bench.line import Message
from bench.paced import HELD_OUT, Pace
from bench.served import Served


class Sleeper:
    """The forward pass of a worker that sleeps for every sample, and how many it had in each step."""

    def __init__(self, pace: Pace, rank: int, ranks: int) -> None:
        self.samples: list[int] = []
        self._pace = pace
        self._rank = rank
        self._ranks = ranks
        self._given = 0

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        if model.training:
            count = len(batch["tokens"])
            self._given += count
            time.sleep(self._pace.seconds(count, self._rank, self._ranks))
        return model(batch["tokens"])

    def end_step(self, state: Any, result: Any) -> None:
        self.samples.append(self._given)
        self._given = 0

    def tell(self, state: Any) -> Message:
        return {"samples": self.samples, "loss": state.evaluations[-1]["loss"]}


def job() -> sw.TrainJob:
    case, pace = Case.from_environment(), Pace.from_environment()
    sleeper = Sleeper(pace, int(os.environ.get("RANK", "0")), case.ranks)
    folder = Path(case.folder)
    return sw.TrainJob(
        model=lambda: work.model(case),
        loss=sw.next_token_loss,
        forward=sleeper.forward,
        data=TokenFile(folder / "tokens.bin", case.context, folder / HELD_OUT),
        optimizer=sw.adamw(lr=case.lr, betas=(0.9, 0.95), weight_decay=0.1),
        global_batch=case.global_batch,
        steps=10**9,
        seed=case.seed,
        eval_every=pace.steps,
        callbacks=(sleeper.end_step, Served(lambda: 0.0, tell=sleeper.tell)),
        save_every=0,
        allow=("param_server",),
    )
