"""What people do with a job besides training it once: files beside it, helpers, parameters of every kind, resuming."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise import events
from shardwise.errors import ShardwiseError, SpecError
from shardwise.train import api

Train = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]

BESIDE = """
from pathlib import Path
import torch
import shardwise as sw

TEXT = (Path(__file__).parent / "table.txt").read_text()
TABLE = torch.tensor([[float(x) for x in line.split()] for line in TEXT.splitlines()])
ALL = {"inputs": TABLE, "targets": torch.arange(len(TABLE)) % 3}

def job(folder: Path = Path("data"), augment: str = "none", sizes: tuple[int, ...] = (3, 4), limit: int | None = None,
        steps: int = 4, precision: str = "float32", wide: bool = False) -> sw.TrainJob:
    assert isinstance(folder, Path) and augment in ("none", "flip") and isinstance(sizes, tuple) and limit is None
    def loss(output, batch):
        from helper import weigh
        return weigh(*sw.cross_entropy(output, batch))
    return sw.TrainJob(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(2, sizes[0])),
        loss=loss,
        data=sw.arrays(ALL, eval=ALL),
        optimizer=(sw.sgd(lr=0.1, params="*.bias"), sw.adamw(lr=0.01)),
        global_batch=4, steps=steps, precision=precision, save_every=2, eval_every=1, keep_last=1,
    )
"""


def named(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in events.read(run / "events.jsonl") if e["event"] == name]


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "table.txt").write_text("\n".join(f"{i} {i % 5}" for i in range(12)))
    (folder / "helper.py").write_text("def weigh(total, weight):\n    return total * 2, weight\n")
    (folder / "profile.py").write_text(BESIDE)
    return folder / "profile.py"


def test_files_beside_the_job_late_imports_and_parameters_of_every_kind(trained: Train, beside: Path) -> None:
    run = trained(beside, plan="data=2", sets=["folder=elsewhere", "augment=none", "sizes=[3,4]", "limit=none"])
    assert (run.path / "code" / "helper.py").exists()
    assert run.summary.step == 4
    resumed = trained(beside, plan="data=1", resume="latest", sets=["folder=elsewhere"])
    assert resumed.path.resolve() == run.path.resolve()
    assert api.evaluate(run.path)["loss"] > 0


def test_two_optimizers_and_float64_train_and_are_used_again(trained: Train, beside: Path, tmp_path: Path) -> None:
    run = trained(beside, plan="data=2,precision=float64")
    assert api.evaluate(run.path)["loss"] == pytest.approx(named(run.path, "evaluation")[-1]["loss"], rel=1e-9)
    assert api.export(run.path, to="safetensors", out=tmp_path / "weights").exists()


def test_the_best_checkpoint_is_saved_when_it_is_the_best(trained: Train, beside: Path) -> None:
    run = trained(beside, plan="data=1", sets=["steps=9"])
    found = named(run.path, "evaluation")
    best = min(found, key=lambda e: e["loss"])
    assert best["step"] in {e["step"] for e in named(run.path, "checkpoint_saved")}
    assert api.evaluate(run.path, checkpoint="best")["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_a_job_file_that_trains_itself_is_stopped_at_the_first_nesting(beside: Path, trained: Train) -> None:
    beside.write_text(beside.read_text() + "\nsw.train(job)\n")
    with pytest.raises(ShardwiseError, match="__main__"):
        trained(beside)


def test_under_a_foreign_launcher_the_plan_is_obeyed(trained: Train, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = ["train", str(tmp_path / "small.py"), "--on", "env", "--set", "steps=5", "--set", "dropout=0.3"]
    command = [sys.executable, "-m", "shardwise", *words, "--plan", "exact=true"]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    there = tmp_path / "runs" / "latest"
    alone = trained(plan="data=1,exact=true", steps=5, dropout=0.3, runs=tmp_path / "alone").path
    assert [e["loss"].hex() for e in named(there, "step")] == [e["loss"].hex() for e in named(alone, "step")]
    assert named(there, "run_finished")[0]["status"] == "finished"


SESSIONS = """
import torch
import shardwise as sw

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(X, X.argmax(1))

def loss(output, batch):
    kinds.add(output.dtype)
    return torch.nn.functional.cross_entropy(output.float(), batch[1], reduction="sum"), len(batch[1])

for precision in ("float32", "bfloat16"):
    kinds = set()
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    with sw.session(model=net, data=data, loss=loss, optimizer=torch.optim.SGD(net.parameters(), 0.1), global_batch=8,
                    steps=6, precision=precision) as run:
        for batch in run.batches():
            run.step(batch)
            if run.step_number == 2:
                break
        for batch in run.batches():
            run.step(batch)
        run.print("STEPS", run.step_number, *kinds)
"""


def test_a_script_may_open_sessions_one_after_the_other(trained: Train, tmp_path: Path) -> None:
    script = tmp_path / "sessions.py"
    script.write_text(SESSIONS)
    said = (trained(script, plan="data=2").path / "logs" / "rank-0.log").read_text()
    assert "STEPS 6 torch.float32" in said
    assert "STEPS 6 torch.bfloat16" in said


WEIGHTED = """
import torch
import shardwise as sw
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.0), torch.nn.Linear(8, 1))
X = torch.randn(40, 4)
sampler = torch.utils.data.WeightedRandomSampler([1.0] * 40, 40)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.arange(40)), batch_size=8, sampler=sampler)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
run = sw.session()
torch.manual_seed(run_rank := int(__import__("os").environ.get("RANK", 0)))
net, optimizer, loader = run.prepare(net, optimizer, loader)
print("SEEN", *[int(i) for x, number in loader for i in number])
"""


def test_a_sampler_of_any_kind_is_shared_out_without_gaps(trained: Train, tmp_path: Path) -> None:
    script = tmp_path / "weighted.py"
    script.write_text(WEIGHTED)
    run = trained(script, plan="data=2").path
    logs = [(run / "logs" / f"rank-{r}.log").read_text().split("SEEN")[1].split() for r in range(2)]
    alone = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(logs[0] + logs[1]) == sorted(alone.stdout.split("SEEN")[1].split())


@pytest.mark.parametrize(
    "plan", ["data=2,exact=true", "data=2,precision=bfloat16", "data=2,microbatches=2", "data=2,offload.optimizer=disk"]
)
def test_prepare_refuses_a_plan_that_it_cannot_obey(plan: str, trained: Train, tmp_path: Path) -> None:
    script = tmp_path / "weighted.py"
    script.write_text(WEIGHTED)
    with pytest.raises(SpecError, match=r"run\.prepare"):
        trained(script, plan=plan)


def test_a_script_cannot_be_resumed_and_has_as_many_ranks_as_places(trained: Train, tmp_path: Path) -> None:
    script = tmp_path / "weighted.py"
    script.write_text(WEIGHTED)
    with pytest.raises(SpecError, match="--resume"):
        trained(script, resume="latest")
    with pytest.raises(ShardwiseError, match="64 ranks"):
        trained(script, plan="data=64")
