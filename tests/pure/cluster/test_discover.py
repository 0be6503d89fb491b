"""What the machine has, read from files and tables that other machines gave."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardwise.cluster import probe
from shardwise.cluster.discover import (
    cpu_model,
    discover,
    find_gpus,
    gpu_kind,
    parse_gpus,
    usable_cores,
    usable_memory,
    visible,
)
from shardwise.errors import ClusterError
from shardwise.spec.cluster import TRANSPORTS

SMI = """\
0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559
1, GPU-abbb-2, NVIDIA A100-SXM4-40GB, 40960
2, GPU-cccc-3, Tesla T4, 15360
3, GPU-dddd-4, NVIDIA Orin, [N/A]
"""


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, proc__meminfo="MemTotal:       16384 kB\nMemFree:  5 kB\n")
    return tmp_path


CPUS = len(os.sched_getaffinity(0))


def test_without_a_control_group(root: Path) -> None:
    assert usable_memory(root) == 16 << 20
    assert usable_cores(root) == CPUS


def test_the_tightest_limit_of_version_2_counts(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="0::/pod/box\n",
        sys__fs__cgroup__pod__memory_DOT_max="4194304\n",
        sys__fs__cgroup__pod__box__memory_DOT_max="max\n",
        sys__fs__cgroup__pod__box__cpu_DOT_max="150000 100000\n",
        sys__fs__cgroup__pod__cpu_DOT_max="max 100000\n",
    )
    assert usable_memory(root) == 4 << 20
    assert usable_cores(root) == 1


def test_version_1(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="4:memory:/box\n3:cpu,cpuacct:/\n0::/\n",
        sys__fs__cgroup__memory__box__memory_DOT_limit_in_bytes="2097152\n",
        sys__fs__cgroup__memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
    )
    folder = root / "sys/fs/cgroup/cpu,cpuacct"
    folder.mkdir()
    (folder / "cpu.cfs_quota_us").write_text("50000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_memory(root) == 2 << 20
    assert usable_cores(root) == 1  # half a core is one core


def test_no_quota_in_version_1(root: Path) -> None:
    write(
        root,
        proc__self__cgroup="3:cpu:/\n",
        sys__fs__cgroup__cpu__cpu_DOT_cfs_quota_us="-1\n",
        sys__fs__cgroup__cpu__cpu_DOT_cfs_period_us="100000\n",
    )
    assert usable_cores(root) == CPUS


def test_a_limit_above_the_machines_memory_is_none(root: Path) -> None:
    write(root, proc__self__cgroup="0::/\n", sys__fs__cgroup__memory_DOT_max=str(1 << 40))
    assert usable_memory(root) == 16 << 20


def test_affinity_counts() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from shardwise.cluster.discover import usable_cores; print(usable_cores())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=os.getcwd())
    assert run.stdout == "1\n", run.stderr


def test_cpu_model(root: Path) -> None:
    write(root, proc__cpuinfo="processor: 0\nmodel name\t: AMD EPYC 9R14\nmodel name\t: other\n")
    assert cpu_model(root) == "AMD EPYC 9R14"
    assert cpu_model(root / "none")


def test_gpus_of_a_table() -> None:
    found = parse_gpus(SMI)
    assert [(gpu.index, gpu.kind, gpu.memory_bytes) for gpu in found] == [
        (0, "h100", 81559 << 20),
        (1, "a100", 40960 << 20),
        (2, "t4", 15360 << 20),
    ]


@pytest.mark.parametrize(
    ("choice", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("1, 7, 0", [1]),
        ("-1", []),
        ("GPU-cccc", [2]),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices(choice: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible(parse_gpus(SMI), choice)] == indices


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000"),
        ("NVIDIA", "gpu"),
    ],
)
def test_kinds_of_gpu(name: str, kind: str) -> None:
    assert gpu_kind(name) == kind


def smi(folder: Path, script: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (tmp_path / "table").write_text(SMI)
    assert [gpu.kind for gpu in find_gpus(smi(tmp_path, f"cat {tmp_path}/table"))] == ["a100"]
    assert find_gpus(smi(tmp_path, "echo 'no driver'; exit 9")) == []
    assert find_gpus(str(tmp_path / "missing")) == []


SPEED = {"cpu": {"float32": 7e10, "bfloat16": 2e11, "memory_bandwidth": 2e10}}


def test_a_kept_measurement_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.cluster.discover.find_gpus", lambda: [])
    monkeypatch.setattr(probe, "_in_child", lambda *args: SPEED)
    cache = tmp_path / "deep" / "cluster.json"
    unmeasured = discover(probe=False, cache=cache)
    assert not unmeasured.devices[0].measured
    assert not cache.exists()
    measured = discover(cache=cache)
    monkeypatch.setattr(probe, "_in_child", None)
    assert discover(cache=cache) == discover(probe=False, cache=cache) == measured
    device = measured.devices[0]
    assert len(measured.devices) == usable_cores() == measured.nodes[0].cores
    assert (device.kind, device.measured, device.memory_bandwidth) == ("cpu", True, 2e10)
    assert device.peak_flops == {"float32": 7e10, "bfloat16": 2e11}
    assert sum(device.memory_bytes for device in measured.devices) <= measured.nodes[0].memory_bytes


@pytest.mark.parametrize(
    ("kernel", "asked", "backend"),
    [
        (None, "auto", "shm-torch"),
        (None, "shm", "shm-torch"),
        (Path("_shm.so"), "auto", "shm"),
        (Path("_shm.so"), "gloo", "gloo"),
        (Path("_shm.so"), "shm-torch", "shm-torch"),
    ],
)
def test_the_link_of_ranks_is_that_of_the_transport_that_they_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Path | None, asked: str, backend: str
) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", asked)
    monkeypatch.setattr("shardwise.cluster.discover.find_gpus", lambda: [])
    monkeypatch.setattr(sys.modules[discover.__module__], "library", lambda: kernel)
    assert discover(probe=False, cache=tmp_path / "cluster.json").nodes[0].link == TRANSPORTS[backend].link


def test_gpus_are_the_devices_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.cluster.discover.find_gpus", lambda: parse_gpus(SMI)[:2])
    speeds = {**SPEED, "h100": {"bfloat16": 8e14, "memory_bandwidth": 3e12}}
    monkeypatch.setattr(probe, "_in_child", lambda *args: speeds)
    found = discover(cache=tmp_path / "cluster.json").devices
    assert [(device.kind, device.measured) for device in found] == [("h100", True), ("a100", False)]
    assert found[0].peak_flops == {"bfloat16": 8e14}


@pytest.mark.parametrize("raw", ["", "[]", "{", '{"key": 3}', '{"key": {"cpu": {"float32": "fast"}}}', "\x00"])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    cache = tmp_path / "cluster.json"
    cache.write_text(raw.replace("key", probe.machine_key("cpu", 2, [])))
    monkeypatch.setattr(probe, "_in_child", lambda *args: SPEED)
    assert probe.speeds("cpu", 2, [], cache=cache) == SPEED
    assert list(json.loads(cache.read_text()).values()) == [SPEED]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(probe, "_in_child", lambda *args: SPEED)
    assert probe.speeds("cpu", 2, [], cache=tmp_path / "file" / "cluster.json") == SPEED


def test_other_machines_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cluster.json"
    for cpu in ("one", "other"):
        monkeypatch.setattr(probe, "_in_child", lambda *args, cpu=cpu: {"cpu": {"float32": float(len(cpu))}})
        probe.speeds(cpu, 2, [], cache=cache)
    monkeypatch.setattr(probe, "_in_child", None)
    assert probe.speeds("one", 2, [], cache=cache)["cpu"] == {"float32": 3.0}
    assert probe.speeds("one", 4, [], cache=cache, probe=False) == {}


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert probe.default_cache() == Path("/c/shardwise/cluster.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert probe.default_cache() == Path("/h/.cache/shardwise/cluster.json")


def test_a_probe_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    monkeypatch.setattr(probe, "_ROOT", str(tmp_path))  # first on the child's path
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ClusterError, match="status 1[\\s\\S]*libtorch is broken"):
        probe.speeds("cpu", 2, [], cache=tmp_path / "cluster.json")


def test_launching_imports_no_torch_and_little_else() -> None:
    code = (
        "import sys\n"
        "import shardwise.cluster.launch, shardwise.cluster.discover\n"
        "print({'torch', 'numpy', 'typer', 'rich'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.stdout == "set()\n", run.stderr


def test_the_zygote_itself_imports_little() -> None:
    heavy = {"msgspec", "typer", "rich", "subprocess", "typing_extensions"}
    code = f"import sys, shardwise.cluster.zygote; print({heavy} & set(sys.modules))"
    run: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.stdout == "set()\n", run.stderr
