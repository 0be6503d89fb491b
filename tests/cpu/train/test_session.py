"""Loops of one's own and existing scripts: alone, on two ranks, and under a foreign launcher, with equal numbers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise import events

Train = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]

DATA = """
import sys
import torch
import shardwise as sw

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
X = torch.randn(103, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
data = torch.utils.data.TensorDataset(X, Y)

def total():
    return sum(p.double().abs().sum().item() for p in net.parameters())
"""

LOOP = (
    DATA
    + """
def loss(output, batch):
    return torch.nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(batch[1])

def accuracy(output, batch):
    return (output.argmax(1) == batch[1]).sum(), len(batch[1])

with sw.session(model=net, data=data, loss=loss, optimizer=torch.optim.SGD(net.parameters(), 0.1), eval_data=data,
                metrics={"accuracy": accuracy}, global_batch=11, epochs=2, runs=None) as run:
    for batch in run.batches():
        run.step(batch)
    found = run.evaluate()
    run.print("RESULT", run.step_number, found["loss"], found["accuracy"], total())
"""
)

PREPARED = (
    DATA
    + """
loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
run = sw.session()
net, optimizer, loader = run.prepare(net, optimizer, loader)
for epoch in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
run.print("RESULT", len(loader), total())
"""
)

ACCUMULATED = (
    DATA
    + """
loader = torch.utils.data.DataLoader(data, batch_size=10)
optimizer = torch.optim.SGD(net[3].parameters(), 0.1)
run = sw.session()
net, optimizer, loader = run.prepare(net, optimizer, loader)
for number, (x, y) in enumerate(loader):
    torch.nn.functional.cross_entropy(net(x), y).backward()
    if number % 2:
        optimizer.step()
        optimizer.zero_grad()
run.print("RESULT", total())
"""
)


def result(text: str) -> list[float]:
    lines = [line for line in text.splitlines() if line.startswith("RESULT")]
    assert len(lines) == 1, text
    return [float(word) for word in lines[0].split()[1:]]


def alone(script: Path) -> list[float]:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return result(done.stdout)


@pytest.mark.parametrize("text", [LOOP, PREPARED, ACCUMULATED], ids=["session", "prepare", "accumulate"])
def test_a_script_computes_the_same_alone_and_on_two_ranks(text: str, trained: Train, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    run = trained(script, plan="data=2").path
    assert result((run / "logs" / "rank-0.log").read_text()) == pytest.approx(alone(script), rel=2e-5)


@pytest.mark.parametrize("plan", ["pipeline=2", "pipeline=2,virtual=2,schedule=zbv,microbatches=3"])
def test_a_session_in_stages_computes_the_same_and_leaves_the_whole_module(
    plan: str, trained: Train, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    middle = LOOP.replace("torch.nn.BatchNorm1d(16)", "torch.nn.LayerNorm(16)")  # norms over samples know microbatches
    last = '    run.print("RESULT", run.step_number, found["loss"], found["accuracy"], total())\n'
    assert last in middle
    script.write_text(middle.replace(last, "") + textwrap.dedent(last))
    run = trained(script, plan=plan).path
    found = [result((run / "logs" / f"rank-{rank}.log").read_text()) for rank in (0,)]
    assert found[0] == pytest.approx(alone(script), rel=2e-5)


def test_a_script_gets_its_arguments_and_a_failure_names_its_line(trained: Train, tmp_path: Path) -> None:
    from shardwise.errors import JobError

    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('RESULT', len(sys.argv) - 1)\n")
    run = trained(script, plan="data=2", args=["--depth", "3"]).path
    assert result((run / "logs" / "rank-0.log").read_text()) == [2.0]
    script.write_text("x = 1\nx.missing\n")
    with pytest.raises(JobError, match=r"script\.py:2"):
        trained(script, plan="data=2")


def test_a_session_keeps_a_record_when_asked(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOOP.replace("runs=None", "runs='kept'"))
    alone(script)
    run = tmp_path / "kept" / "latest"
    steps = [e for e in events.read(run / "events.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 20))
    assert list((run / "checkpoints").glob("step-*/manifest.json"))


def test_a_nested_train_is_refused(trained: Train, tmp_path: Path) -> None:
    from shardwise.errors import ShardwiseError

    script = tmp_path / "script.py"
    script.write_text("import shardwise as sw\nsw.train(__file__)\n")
    with pytest.raises(ShardwiseError, match="__main__"):
        trained(script, plan="data=1")


@pytest.mark.slow
def test_a_job_runs_under_the_variables_of_a_foreign_launcher(trained: Train, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "shardwise",
        "train",
        str(tmp_path / "small.py"),
        "--on",
        "env",
        "--set",
        "steps=6",
    ]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    here = [e["loss"] for e in events.read(tmp_path / "runs" / "latest" / "events.jsonl") if e["event"] == "step"]
    local = trained(plan="data=2", steps=6, runs=tmp_path / "local").path
    there = [e["loss"] for e in events.read(local / "events.jsonl") if e["event"] == "step"]
    assert here == pytest.approx(there, rel=1e-6)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT, signal.SIGKILL]
)
def test_a_signal_to_the_command_ends_every_rank(number: signal.Signals, trained: Train, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardwise", "train", str(tmp_path / "small.py"), "--quiet"]
    started = subprocess.Popen(
        [*command, "--set", "steps=100000"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    record = tmp_path / "runs" / "latest" / "events.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(e["event"] == "step" for e in events.read(record)):
        time.sleep(0.1)
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _belongs(p, started.pid)]
    assert len(pids) >= 3, "a zygote and two ranks"
    started.send_signal(number)
    started.wait(30)
    until = time.monotonic() + 20
    while time.monotonic() < until and any(_alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


def _belongs(process: Path, ancestor: int) -> bool:
    pid = int(process.name)
    while pid > 1:
        try:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return False
        if pid == ancestor:
            return True
    return False


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
