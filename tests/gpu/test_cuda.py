"""On a CUDA device: whole runs, the same loss as on the CPU, every precision, and the group over nccl."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardwise import events
from shardwise.comm.mesh import connect
from shardwise.data.loader import Micro
from shardwise.models.gpt import GPT
from shardwise.models.losses import next_token_loss
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run on a machine that has one"),
]

JOB = """
import torch
import shardwise as sw
from shardwise.models.gpt import GPT

def job(steps: int = 8, precision: str = "float32", die_at: int = 0) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: GPT(layers=2, width=64, heads=2, vocab=257, context=64),
        loss=sw.next_token_loss,
        data=sw.text(TEXT, tokenizer="bytes", vocab=257, context=64, held_out=0.2),
        optimizer=sw.adamw(lr=1e-3),
        global_batch=8, steps=steps, clip_norm=1.0, eval_every=steps, save_every=4, precision=precision,
    )
"""


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    from shardwise.train import api

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the {i} cats sat on the {i % 3} mats\n" * 60)
    file = tmp_path / "job.py"
    file.write_text(JOB.replace("TEXT", repr(str(tmp_path / "text"))))
    return lambda **more: Path(api.train(str(file), display=False, runs=tmp_path / "runs", **more).path)


def losses(run: Path) -> list[float]:
    return [e["loss"] for e in events.read(run / "events.jsonl") if e["event"] == "step"]


def test_a_run_on_the_device_and_its_resumption(trained: Callable[..., Path]) -> None:
    run = trained(plan="data=1")
    found = losses(run)
    assert len(found) == 8
    assert found[-1] < found[0]
    (memory,) = [e for e in events.read(run / "events.jsonl") if e["event"] == "memory"]
    assert memory["peak_bytes"] > 0
    assert "cpu" not in (run / "cluster.json").read_text().split('"kind"')[1][:12]
    assert losses(trained(plan="data=1", resume="latest")) == found, "a finished run has nothing left to do"


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 0.03), ("float16", 0.01), ("float64", 1e-3)])
def test_every_precision_trains_like_float32(trained: Callable[..., Path], precision: str, near: float) -> None:
    want, found = losses(trained(plan="data=1")), losses(trained(plan="data=1", precision=precision))
    finite = [(a, b) for a, b in zip(want, found, strict=True)]
    assert all(abs(a - b) <= near * a for a, b in finite), (want, found)


def _steps(device: str, mesh: Any, plan: Plan, count: int = 4) -> list[float]:
    torch.manual_seed(0)
    replica = parallelize(GPT(layers=2, width=64, heads=2, vocab=64, context=32), plan, mesh)
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        micro = []
        for shard in range(4 if plan.exact else 1):
            tokens = torch.randint(64, (2, 33), generator=generator)
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
            micro.append(Micro(batch=batch, stream=number, samples=[], shard=shard if plan.exact else None))
        found.append(step(replica, [optimizer], micro, loss=next_token_loss).loss)
    replica.close()
    return found


@pytest.mark.parametrize("exact", [False, True])
def test_steps_on_the_device_equal_steps_on_the_cpu(exact: bool) -> None:
    plan = Plan(exact=exact)
    here = _steps("cpu", connect(plan, rank=0, world=1, store=None), plan)
    there = _steps("cuda", connect(plan, rank=0, world=1, store=None, device="cuda:0"), plan)
    assert there == pytest.approx(here, rel=2e-4)


def test_exact_steps_repeat_bit_for_bit_on_the_device() -> None:
    plan = Plan(exact=True)
    runs = [_steps("cuda", connect(plan, rank=0, world=1, store=None, device="cuda:0"), plan) for _ in range(2)]
    assert [x.hex() for x in runs[0]] == [x.hex() for x in runs[1]]


def test_the_group_over_nccl() -> None:
    from shardwise.comm.group import NAME, GroupSettings, register

    register()
    settings = GroupSettings(("cpu", "cuda"), "127.0.0.1", 1, 60.0, 0)
    torch.cuda.set_device(0)
    dist.init_process_group(
        NAME, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60), pg_options=settings
    )
    try:
        for device in ("cuda", "cpu"):
            tensor = torch.arange(8.0, device=device)
            dist.all_reduce(tensor)
            assert tensor.tolist() == list(range(8))
            gathered = torch.empty(8, device=device)
            dist.all_gather_into_tensor(gathered, tensor)
            assert gathered.tolist() == list(range(8))
        dist.barrier()
    finally:
        dist.destroy_process_group()
