"""One zygote for all tests that start ranks, and a small job to train with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.cluster.local import Zygote
from shardwise.train import start

JOB = """
import math, os, signal
import torch
import shardwise as sw

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3] * torch.tensor([1.0, 2.0, 3.0])).argmax(1)


class Net(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 3)
        )

    def forward(self, inputs):
        return self.layers(inputs)


def kill_once(at, flag):
    def callback(state, result):
        if state.step == at and flag and not os.path.exists(flag) and int(os.environ["RANK"]) == 0:
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    return callback


def job(steps: int = 12, dropout: float = 0.0, batch: int = 16, die_at: int = 0, flag: str = "", nan_at: int = 0,
        on_nan: str = "stop", save_every: int = 4, eval_every: int = 4, patience: int = 0, clip: float = 1.0,
        log: str = "", width: int = 3, allow: str = "") -> sw.TrainJob:
    calls = [0]

    def loss(output, batch):
        total, weight = sw.cross_entropy(output, batch)
        if torch.is_grad_enabled() and output.requires_grad:
            calls[0] += 1
            if nan_at and calls[0] >= nan_at:
                total = total * math.nan
        return total, weight

    return sw.TrainJob(
        model=lambda: Net(dropout),
        loss=loss,
        data=sw.arrays({"inputs": X, "targets": Y}, eval={"inputs": X[:32], "targets": Y[:32]}),
        optimizer=sw.adamw(lr=0.01, warmup=2, schedule="linear"),
        metrics={"accuracy": sw.accuracy},
        allow=tuple(allow.split()),
        global_batch=batch,
        steps=steps,
        clip_norm=clip or None,
        eval_every=eval_every,
        save_every=save_every,
        on_nan=on_nan,
        early_stop=sw.EarlyStop(patience=patience, better="higher") if patience else None,
        callbacks=(kill_once(die_at, flag),),
        log=tuple(filter(None, [log])),
    )
"""


class Shared:
    """A Starter that outlives the call that was given it."""

    def __init__(self, starter: Any) -> None:
        self._starter = starter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._starter, name)

    def close(self) -> None:
        return None


@pytest.fixture(scope="session")
def zygote() -> Iterator[Any]:
    started = Zygote.start(start.PRELOAD)
    yield started
    started.close()


@pytest.fixture
def trained(zygote: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`trained(plan="data=2", steps=6)` trains the small job; the run folders are in `tmp_path / "runs"`."""
    from shardwise.train import api

    monkeypatch.setattr(start, "take", lambda: Shared(zygote))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "small.py"
    file.write_text(JOB)

    def train(job: str | Path = file, **options: Any) -> Any:
        return api.train(str(job), **{"runs": tmp_path / "runs", "display": False, **options})

    return train
