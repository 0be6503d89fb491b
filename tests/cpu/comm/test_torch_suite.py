"""What PyTorch's own suite says of `shm`, beside what it says of gloo on the same machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.comm.kernel import library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ONLY_GLOO = "torch.distributed calls a method that only gloo's own class has"
EXCUSED = {
    "test_monitored_barrier_gloo": ONLY_GLOO,
    "test_monitored_barrier_gloo_rank_0_timeout": ONLY_GLOO,
    "test_monitored_barrier_gloo_subgroup": ONLY_GLOO,
    "test_sparse_all_reduce_sum": "sparse tensors: the reducer refuses them, and nothing else here makes any",
}


def outcomes(backend: str, tmp_path: Path, transport: str = "auto") -> dict[str, str]:
    out = tmp_path / f"{backend}.json"
    subprocess.run(
        [sys.executable, "-m", "tests.cpu.comm.torch_suite", backend, str(out)],
        cwd=ROOT,
        env=os.environ | {"BACKEND": backend, "CUDA_VISIBLE_DEVICES": "", "SHARDWISE_TRANSPORT": transport},
        check=True,
        capture_output=True,
        timeout=1500,
    )
    found: dict[str, str] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What gloo passes on this machine."""
    return {name for name, said in outcomes("gloo", tmp_path_factory.mktemp("gloo")).items() if said == "passed"}


@pytest.mark.parametrize("transport", ["shm", "shm-torch"])
def test_what_gloo_passes_passes(gloo: set[str], transport: str, tmp_path: Path) -> None:
    if transport == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    ours = outcomes("shm", tmp_path, transport)
    failed = {name: ours[name] for name in gloo if ours[name] != "passed" and name not in EXCUSED}
    assert len(gloo) > 70
    assert not failed, "\n\n".join(f"{name}: {said}" for name, said in failed.items())
    assert len(EXCUSED) <= 0.05 * len(gloo)
