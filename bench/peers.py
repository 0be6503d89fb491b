"""The systems of `data_parallel`: how each is launched, by its own launcher, and what installs it."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.case import Case
from bench.launched import ROOT
from bench.subject import Subject

PYTHON = sys.executable
_SCRIPT = Path(PYTHON).parent / "shardwise"  # there once the package is installed; else what it would run
_ENTRY = "import sys; from shardwise.cli.main import main; sys.exit(main())"
SHARDWISE = [str(_SCRIPT)] if _SCRIPT.exists() else [PYTHON, "-c", _ENTRY]


@dataclass(frozen=True)
class Peer:
    """`package` is looked for without importing it; `command(case)` starts all ranks.

    `alone`: its ranks learn nothing from each other, so that its losses are not to be compared.
    """

    package: str
    install: str
    command: Callable[[Case], list[str]]
    exact: bool = False
    alone: bool = False
    env: dict[str, str] = field(default_factory=dict)

    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _module(name: str, *before: str) -> list[str]:
    return [PYTHON, *before, "-m", f"bench.subjects.{name}"]


def _shardwise(case: Case) -> list[str]:
    """`shardwise train FILE --plan data=N`, in the folder of the case."""
    plan = f"data={case.ranks}" + (",exact=true" if case.exact else "")
    return [*SHARDWISE, "train", str(ROOT / "bench" / "jobs" / "data_parallel.py"), "--plan", plan]


def torchrun(ranks: int, module: str) -> list[str]:
    """`torchrun --standalone --nproc-per-node N -m MODULE`; the module is what the script calls."""
    return [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", module]


def accelerate_launch(ranks: int, module: str) -> list[str]:
    """`accelerate launch --multi_gpu` starts several processes on CPU too, where the script says `cpu=True`."""
    flags = ["--num_processes", str(ranks), "--num_machines", "1", "--num_cpu_threads_per_process", "1"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    several = ["--multi_gpu"] if ranks > 1 else []
    return [PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch", *several, *flags, "-m", module]


def _ddp(case: Case) -> list[str]:
    return torchrun(case.ranks, "bench.subjects.ddp")


def _unsynchronised(case: Case) -> list[str]:
    return torchrun(case.ranks, "bench.subjects.unsynchronised")


def _barrier(case: Case) -> list[str]:
    return [*_unsynchronised(case), "--barrier"]


def _accelerate(case: Case) -> list[str]:
    return accelerate_launch(case.ranks, "bench.subjects.accelerate")


def _lightning(case: Case) -> list[str]:
    return _module("lightning")


def _ray(case: Case) -> list[str]:
    return _module("ray_train")


def _deepspeed(case: Case) -> list[str]:
    """`deepspeed --num_accelerators N --module ...`."""
    count = ["--num_nodes", "1", "--num_accelerators", str(case.ranks), "--master_port", str(free_port())]
    runner = [PYTHON, "-m", "deepspeed.launcher.runner"]
    return [*runner, *count, "--no_local_rank", "--module", "bench.subjects.deepspeed"]


# While other systems have their turn Ray is stopped with all its processes: no missed heartbeat may count as a death.
RAY = {"RAY_health_check_failure_threshold": "1000000", "RAY_health_check_timeout_ms": "600000"}

PEERS = {
    "shardwise": Peer("shardwise", "pip install -e .", _shardwise),
    "shardwise:exact": Peer("shardwise", "pip install -e .", _shardwise, exact=True),
    "ddp": Peer("torch", "pip install torch", _ddp),
    "unsynchronised": Peer("torch", "pip install torch", _unsynchronised, alone=True),
    "barrier": Peer("torch", "pip install torch", _barrier, alone=True),
    "accelerate": Peer("accelerate", "pip install accelerate", _accelerate),
    "lightning": Peer("lightning", "pip install lightning", _lightning),
    "ray-train": Peer("ray", "pip install 'ray[train]'", _ray, env=RAY),
    "deepspeed": Peer("deepspeed", "DS_BUILD_OPS=0 pip install deepspeed", _deepspeed),
}


def subject(name: str, peer: Peer, case: Case) -> Subject:
    """The system `name` for a case, not yet started."""
    env = dict(peer.env)
    if case.device == "cpu":
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return Subject(name, peer.command(case), ranks=case.ranks, env=env | case.environment(), folder=case.folder)


def free_port() -> int:
    """A port that is free now, for a launcher that cannot choose one itself."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])
