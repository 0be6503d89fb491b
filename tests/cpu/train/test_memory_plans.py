"""Whole runs whose plans keep less in memory: the same numbers where they may be, and checkpoints read by any plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import ClusterError, SpecError
from shardwise.train import api
from tests.cpu.train.test_train import losses, named, weights

Train = Callable[..., Any]

JOB = """
import os, signal
import torch
import shardwise as sw

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.down(torch.relu(self.up(x))))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(12, 64), torch.nn.Linear(64, 3)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, inputs):
        x = self.enter(inputs)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def kill_once(at, flag):
    def callback(state, result):
        if state.step == at and flag and not os.path.exists(flag) and int(os.environ["RANK"]) == 0:
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    return callback


def job(steps: int = 8, die_at: int = 0, flag: str = "", allow: str = "bfloat16 parameters states") -> sw.TrainJob:
    return sw.TrainJob(
        model=Net,
        loss=sw.cross_entropy,
        data=sw.arrays({"inputs": X, "targets": (X[:, :3] + X[:, 3:6]).argmax(1)}),
        optimizer=sw.adamw(lr=0.01, warmup=2),
        allow=tuple(allow.split()),
        global_batch=16,
        steps=steps,
        save_every=3,
        callbacks=(kill_once(die_at, flag),),
    )
"""


@pytest.fixture
def blocks(trained: Train, tmp_path: Path) -> Train:
    """`trained` with a job whose matrices are large enough to be kept elsewhere."""
    file = tmp_path / "blocks_job.py"
    file.write_text(JOB)
    return lambda **options: trained(job=file, **options)


def killed_then(before: str, after: str, blocks: Train, tmp_path: Path) -> Any:
    with pytest.raises(ClusterError):
        blocks(plan=before, die_at=5, flag=str(tmp_path / "killed"))
    went_on = blocks(plan=after, resume="latest")
    assert named(went_on.path, "resumed")[0]["step"] == 3
    return went_on


@pytest.mark.parametrize(
    "plan",
    [
        "recompute=full,offload.optimizer=disk",
        pytest.param("offload.optimizer=disk", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_states_on_disk_is_the_same_bits_through_a_kill(plan: str, blocks: Train, tmp_path: Path) -> None:
    whole = blocks(plan="data=1")
    went_on = killed_then(f"data=1,{plan}", f"data=1,{plan}", blocks, tmp_path)
    assert losses(went_on.path)[-5:] == losses(whole.path)[3:]
    for name, tensor in weights(whole.path).items():
        assert torch.equal(weights(went_on.path)[name], tensor), name
    assert not [file for file in went_on.path.iterdir() if file.name.startswith("shardwise-")]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("data=1,offload.optimizer=disk", "data=1", marks=pytest.mark.slow),
        pytest.param("data=1", "data=1,offload.optimizer=disk,offload.activations=disk", marks=pytest.mark.slow),
        ("data=2,offload.optimizer=disk", "pipeline=2,offload.optimizer=disk,recompute=full"),
        pytest.param("pipeline=2,offload.optimizer=disk", "data=2", marks=pytest.mark.slow),
        pytest.param("shard=2,zero=1,offload.optimizer=disk", "data=2,offload.optimizer=disk", marks=pytest.mark.slow),
        pytest.param("data=2,offload.optimizer=disk", "shard=2,zero=3,offload.optimizer=disk", marks=pytest.mark.slow),
        pytest.param("data=2", "shard=2,zero=1,offload.optimizer=disk", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_are_read_wherever_the_states_were(before: str, after: str, blocks: Train, tmp_path: Path) -> None:
    told = ",offload.optimizer=disk", ",offload.activations=disk", ",recompute=full"
    plain = [before, after]
    for words in told:
        plain = [plan.replace(words, "") for plan in plain]
    first = killed_then(before, after, blocks, tmp_path)
    (tmp_path / "killed").unlink()
    second = killed_then(plain[0], plain[1], blocks, tmp_path)
    assert losses(first.path)[-5:] == losses(second.path)[-5:]
    for name, tensor in weights(second.path).items():
        assert torch.equal(weights(first.path)[name], tensor), name


LOW = "data=1,precision=bfloat16,parameters=bfloat16"


@pytest.mark.parametrize(
    "plan",
    [
        f"{LOW},master=none,states=int8",
        pytest.param("data=1,states=int8", marks=pytest.mark.slow),
        pytest.param(f"{LOW},master=none,states=bfloat16", marks=pytest.mark.slow),
        pytest.param(f"{LOW},states=int8,offload.optimizer=disk", marks=pytest.mark.slow),
        pytest.param("data=1,states=bfloat16,offload.optimizer=disk", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_fewer_bits_goes_on_with_the_same_bits(plan: str, blocks: Train, tmp_path: Path) -> None:
    whole = blocks(plan=plan)
    went_on = killed_then(plan, plan, blocks, tmp_path)
    assert losses(went_on.path)[-5:] == losses(whole.path)[3:]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data=1,states=int8", "data=1"),
        pytest.param("data=1", "data=1,states=int8", marks=pytest.mark.slow),
        pytest.param("data=1,states=bfloat16", "data=1", marks=pytest.mark.slow),
        pytest.param(LOW, "data=1,precision=bfloat16", marks=pytest.mark.slow),
        pytest.param("data=1,precision=bfloat16", f"{LOW},states=int8", marks=pytest.mark.slow),
    ],
)
def test_other_formats_go_on_from_a_checkpoint(before: str, after: str, blocks: Train, tmp_path: Path) -> None:
    whole = blocks(plan="data=1")
    went_on = killed_then(before, after, blocks, tmp_path)
    assert losses(went_on.path)[-5:] == pytest.approx(losses(whole.path)[3:], rel=0.1)


PARTS = [
    "tensor=2,states=int8,offload.optimizer=disk",
    "shard=2,zero=1,precision=bfloat16,parameters=bfloat16",
    "shard=2,zero=3,precision=bfloat16,parameters=bfloat16,states=int8",
    "tensor=2,precision=bfloat16,parameters=bfloat16,states=bfloat16",
]


@pytest.mark.parametrize("plan", [pytest.param(p, marks=[pytest.mark.slow] if p in PARTS[2:] else []) for p in PARTS])
def test_ranks_with_parts_go_on_with_the_same_bits(plan: str, blocks: Train, tmp_path: Path) -> None:
    whole = blocks(plan=plan)
    went_on = killed_then(plan, plan, blocks, tmp_path)
    assert losses(went_on.path)[-5:] == losses(whole.path)[3:]
    for name, tensor in weights(whole.path).items():
        assert torch.equal(weights(went_on.path)[name], tensor), name


def test_masters_are_what_a_checkpoint_has(blocks: Train) -> None:
    run = blocks(plan=LOW)
    assert {tensor.dtype for tensor in weights(run.path).values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in weights(run.path).values())


@pytest.mark.parametrize(
    ("plan", "kind", "says"),
    [
        ("data=1,states=int8", SpecError, "'states'"),
        ("data=1,precision=bfloat16,parameters=bfloat16", SpecError, "allow"),
        ("data=1,offload.optimizer=host", SpecError, "host memory already"),
        ("data=1,recompute=blocks,recompute.blocks=7", SpecError, "numbers 0 to 2"),
    ],
)
def test_what_cannot_be_is_refused(plan: str, kind: type[Exception], says: str, blocks: Train) -> None:
    with pytest.raises((kind, ClusterError), match=says):
        blocks(plan=plan, allow="")


@pytest.mark.parametrize(
    "plan",
    [
        "data=2,recompute=full,offload.optimizer=disk,offload.activations=disk",
        pytest.param("pipeline=2,recompute=full,states=int8,offload.optimizer=disk", marks=pytest.mark.slow),
        pytest.param("shard=2,zero=3,recompute=selective,offload.optimizer=disk", marks=pytest.mark.slow),
    ],
)
def test_verify_finds_nothing(plan: str, blocks: Train, tmp_path: Path) -> None:
    report = api.verify(tmp_path / "blocks_job.py", plan=plan)
    assert report.same, report.text()
    assert report.parameters.error is not None
    assert report.parameters.error < 1e-9
