"""What this machine has and lacks for training: versions, devices, backends, space, and the commands that help."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from shardwise.comm.kernel import library
from shardwise.units import format_bytes

Verdict = Literal["ok", "note", "missing"]
NEEDED = ("torch", "numpy", "msgspec", "typer", "rich", "tokenizers", "safetensors", "pillow")
OPTIONAL = {
    "transformers": "pretrained models, export --to transformers",
    "datasets": "Hugging Face data sets",
    "tensorboard": "log=('tensorboard',)",
    "wandb": "log=('wandb',)",
    "mlflow-skinny": "log=('mlflow',)",
    "ray": "more than one machine",
}
PROBE_S = 120.0
PROBE = """
import json, torch
from torch import distributed
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "gloo": distributed.is_available() and distributed.is_gloo_available(),
    "nccl": distributed.is_available() and distributed.is_nccl_available(),
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "built_for": torch.version.cuda or "",
}))
"""


class Finding(Struct, frozen=True, kw_only=True):
    """One line of the examination. `missing` is something needed that is not there; `fix` is what to do about it."""

    topic: str
    said: str
    verdict: Verdict = "ok"
    fix: str = ""


def examine(*, runs: Path, cache: Path, probe: Callable[[], dict[str, Any]] | None = None) -> list[Finding]:
    """All findings, in the order they are printed. `probe` asks torch what it can do, by default in a child."""
    return [
        _python(),
        *_packages(),
        _platform(platform.system(), platform.release()),
        _cores(),
        _memory(),
        *_torch(probe or probe_torch),
        _kernel(),
        _space(runs),
        *(_writable(name, folder) for name, folder in (("runs", runs), ("cache", cache))),
        *_optional(),
    ]


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(finding.verdict != "missing" for finding in findings)


def cache_folder() -> Path:
    """Where caches go: `shardwise` under XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwise"


def probe_torch() -> dict[str, Any]:
    """What torch says of itself, asked in a child, so that a broken installation breaks only the child.

    A dict with `torch`, `gloo`, `nccl`, `gpus`, `built_for`, or only `error`.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_S, check=False
        )
        found = json.loads(child.stdout) if child.returncode == 0 else {}
    except subprocess.TimeoutExpired:
        return {"error": f"import torch took more than {PROBE_S:.0f} s"}
    except ValueError:
        found = {}
    return found or {"error": (child.stderr.strip().splitlines() or ["import torch failed"])[-1]}


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    fix = "" if good else "Install Python 3.11 or newer."
    return Finding(topic="python", said=platform.python_version(), verdict="ok" if good else "missing", fix=fix)


def _packages() -> Iterator[Finding]:
    yield Finding(topic="shardwise", said=_version("shardwise") or "run from its source folder")
    for name in NEEDED:
        version = _version(name)
        fix = "" if version else f"pip install {name}"
        yield Finding(topic=name, said=version or "not installed", verdict="ok" if version else "missing", fix=fix)


def _platform(system: str, release: str) -> Finding:
    match system:
        case "Linux" if "microsoft" in release.lower():
            return Finding(topic="platform", said=f"WSL2, {release}: supported as Linux is")
        case "Linux":
            return Finding(topic="platform", said=f"Linux {release}, {platform.machine()}: supported in full")
        case "Darwin":
            said = "macOS: ranks are spawned, not forked, and talk over gloo; starting takes seconds longer"
            return Finding(topic="platform", said=said, verdict="note")
        case "Windows":
            fix = "Install WSL2 (wsl --install) and Shardwise inside it."
            return Finding(topic="platform", said="Windows: supported through WSL2 only", verdict="missing", fix=fix)
    return Finding(topic="platform", said=f"{system} {release}: not tried by us", verdict="note")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding(topic="cores", said=f"{usable} usable of {os.cpu_count()}")


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        said = f"{format_bytes(sizes['MemAvailable'])} free of {format_bytes(sizes['MemTotal'])}"
    except (OSError, KeyError, ValueError, IndexError):
        return Finding(topic="memory", said="not known on this platform", verdict="note")
    return Finding(topic="memory", said=said)


def _torch(probe: Callable[[], dict[str, Any]]) -> Iterator[Finding]:
    if _version("torch") is None:
        return
    found = probe()
    if "error" in found:
        fix = "pip install --force-reinstall torch"
        yield Finding(topic="backends", said=f"torch does not import: {found['error']}", verdict="missing", fix=fix)
        return
    gpus = [str(name) for name in found.get("gpus", [])]
    built = (
        f"; this torch is built for CUDA {found['built_for']}" if found.get("built_for") else "; this torch has no CUDA"
    )
    yield Finding(topic="gpus", said=", ".join(gpus) or f"none seen{built}", verdict="ok" if gpus else "note")
    there = [name for name in ("gloo", "nccl") if found.get(name)]
    needed = "nccl" if gpus else "gloo"
    lacks = needed not in there
    fix = f"Install a build of torch with {needed}; see pytorch.org." if lacks else ""
    said = ", ".join(there) or "none"
    yield Finding(topic="backends", said=said, verdict="missing" if lacks else "ok", fix=fix)


def _kernel() -> Finding:
    if library() is not None:
        return Finding(topic="shared memory", said="the compiled kernel is there")
    said = "no compiled kernel: ranks of one host talk over gloo, several times slower"
    fix = ""
    if sys.platform == "linux":
        said = "no compiled kernel: ranks of one host share memory through torch, about two times slower"
        fix = "Install a C compiler and then shardwise again."
    return Finding(topic="shared memory", said=said, verdict="note", fix=fix)


def _space(runs: Path) -> Finding:
    free = shutil.disk_usage(_existing(runs)).free
    low = free < 2**30
    fix = "Free some space, or put runs elsewhere with --runs DIR." if low else ""
    said = f"{format_bytes(free)} free for {runs}{os.sep}"
    return Finding(topic="disk", said=said, verdict="note" if low else "ok", fix=fix)


def _writable(topic: str, folder: Path) -> Finding:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding(topic=topic, said=f"{folder} is writable")
    except OSError as error:
        fix = f"Make {place} writable" + (", or use --runs DIR." if topic == "runs" else ", or set XDG_CACHE_HOME.")
        return Finding(topic=topic, said=f"{folder}: {error.strerror}", verdict="missing", fix=fix)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def _optional() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        version = _version(name) or (_version("mlflow") if name == "mlflow-skinny" else None)
        if version:
            yield Finding(topic=name, said=version)
        else:
            yield Finding(topic=name, said=f"not installed; for {use}", verdict="note", fix=f"pip install {name}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
