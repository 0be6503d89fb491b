"""How fast the devices here are: matrix products and memory, measured for two seconds in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise import events
from shardwise.cluster.process import Starter
from shardwise.errors import ClusterError
from shardwise.spec.files import write_whole

if TYPE_CHECKING:
    import torch

BUDGET_S = 2.0  # for one kind of device, without the import of torch
_LIMIT_S = 120.0
_ROOT = str(Path(__file__).resolve().parents[2])
_SIZES = (256, 512, 1024)
_GPU_SIZES = (1024, 2048, 4096, 8192)
_STREAM_BYTES = 64 << 20  # larger than the caches of one core
_GPU_STREAM_BYTES = 1 << 30
Speeds = dict[str, dict[str, float]]


def speeds(
    cpu: str,
    cores: int,
    gpu_kinds: Sequence[str],
    *,
    cache: Path | None = None,
    starter: Starter | None = None,
    probe: bool = True,
) -> Speeds:
    """FLOP/s by dtype and `memory_bandwidth` in bytes/s of one core ("cpu") and of each kind of GPU.

    From the cache where this processor, these GPUs and this torch were measured before; else measured if `probe`, or
    empty. A core's figures are its share when all cores work. Raises ClusterError where the measurement fails.
    """
    file = cache or default_cache()
    key = machine_key(cpu, cores, gpu_kinds)
    known = _read(file)
    if key in known or not probe:
        return known.get(key, {})
    found = _in_child(cores, gpu_kinds, starter)
    _write(file, {**known, key: found})
    return found


def default_cache() -> Path:
    """`cluster.json` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "shardwise" / "cluster.json"


def measure(cores: int, gpu_kinds: Sequence[str], out: str) -> None:
    """Measure here and write the result to `out` as JSON. Imports torch and may initialise CUDA: never call it in a
    process that is to fork."""
    import torch

    found: Speeds = {"cpu": _measure_cpu(torch, cores)}
    if gpu_kinds and torch.cuda.is_available():
        from shardwise.cluster.discover import gpu_kind

        for index in range(torch.cuda.device_count()):
            kind = gpu_kind(torch.cuda.get_device_name(index))
            if kind not in found:
                found[kind] = _measure_gpu(torch, index)
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def _measure_cpu(torch: Any, cores: int) -> dict[str, float]:
    torch.set_num_threads(cores)
    found = {}
    for name in ("float32", "bfloat16"):
        flops = _peak_flops(torch, _SIZES, getattr(torch, name), "cpu", _wall_clock, BUDGET_S / 3)
        found[name] = flops / cores
    bandwidth = _copy_bandwidth(torch, _STREAM_BYTES, "cpu", _wall_clock, BUDGET_S / 4)
    return {**found, "memory_bandwidth": bandwidth / cores}


def _measure_gpu(torch: Any, index: int) -> dict[str, float]:
    device = f"cuda:{index}"

    def timed(work: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(index):
            begin.record()
            work()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    names = ["float32", "float16"] + (["bfloat16"] if torch.cuda.is_bf16_supported() else [])
    found = {name: _peak_flops(torch, _GPU_SIZES, getattr(torch, name), device, timed, BUDGET_S / 5) for name in names}
    return {**found, "memory_bandwidth": _copy_bandwidth(torch, _GPU_STREAM_BYTES, device, timed, BUDGET_S / 5)}


def _peak_flops(
    torch: Any,
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: str,
    timed: Callable[[Callable[[], object]], float],
    budget_s: float,
) -> float:
    """The best rate of square matrix products of growing size, 2 n^3 FLOPs each, within about `budget_s` seconds."""
    best = 0.0
    limit = float("inf")
    for size in sizes:
        flops = 2.0 * size**3
        if best and flops / best * 3 > limit - time.perf_counter():
            break  # a processor without this dtype would take the whole budget for one product
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        work = _product(torch, left, right, out)
        timed(work)
        if not best:
            limit = time.perf_counter() + budget_s  # the first product of a device also loads its libraries
        until = limit if size == sizes[-1] else min(limit, time.perf_counter() + budget_s / 8)
        while True:
            best = max(best, flops / max(timed(work), 1e-9))
            if time.perf_counter() >= until:
                break
    return best


def _product(torch: Any, left: Any, right: Any, out: Any) -> Callable[[], object]:
    return lambda: torch.mm(left, right, out=out)


def _copy_bandwidth(
    torch: Any, size: int, device: str, timed: Callable[[Callable[[], object]], float], budget_s: float
) -> float:
    """Bytes read and written a second by the best of several copies of `size` bytes."""
    limit = time.perf_counter() + budget_s
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    best = 0.0
    while not best or time.perf_counter() < limit:
        best = max(best, 2.0 * size / max(timed(lambda: target.copy_(source)), 1e-9))
    return best


def _wall_clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _in_child(cores: int, gpu_kinds: Sequence[str], starter: Starter | None) -> Speeds:
    with tempfile.TemporaryDirectory(prefix="shardwise-probe-") as folder:
        out, log = Path(folder) / "speeds.json", Path(folder) / "log"
        args = {"cores": cores, "gpu_kinds": list(gpu_kinds), "out": str(out)}
        if starter is None:
            status = _run_fresh(args, log)
        else:
            started = starter.fork("shardwise.cluster.probe:measure", args, env={}, threads=cores, stdout=log)
            status = starter.wait_for(started.pid, _LIMIT_S)
        if status != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:]) if log.exists() else ""
            raise ClusterError(
                f"the measurement of this machine's speed ended with status {status}. "
                f"Check that torch can be imported here. It said:\n{tail}"
            )
        found: Speeds = json.loads(out.read_bytes())
        return found


def _run_fresh(args: dict[str, Any], log: Path) -> int:
    code = (
        f"import sys, json; sys.path[:] = json.loads(sys.argv[1]); sys.path.insert(0, {_ROOT!r})\n"
        "from shardwise.cluster.probe import measure; measure(**json.loads(sys.argv[2]))"
    )
    command = [sys.executable, "-P", "-c", code, json.dumps(sys.path), json.dumps(args)]
    with open(log, "wb") as out:
        try:
            run = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"the measurement of this machine's speed took more than {_LIMIT_S:.0f} s.") from None
    return run.returncode


def machine_key(cpu: str, cores: int, gpu_kinds: Sequence[str]) -> str:
    """What decides the figures of a machine: what was measured is kept under this name."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = "none"
    return " | ".join([cpu, f"{cores} cores", *gpu_kinds, f"torch {version}"])


def _read(file: Path) -> dict[str, Speeds]:
    """What was measured before; a file that is missing or not ours is as good as empty."""
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in known.items() if _is_speeds(value)} if isinstance(known, dict) else {}


def _is_speeds(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(device, dict) and all(isinstance(rate, float | int) and rate >= 0 for rate in device.values())
        for device in value.values()
    )


def _write(file: Path, known: dict[str, Speeds]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(known, indent=2).encode() + b"\n")
    except OSError as error:
        events.emit(
            "warning",
            message=f"cannot keep the measured speeds in {file} ({error}); they are measured again next time.",
        )
