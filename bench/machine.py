"""The machine that a benchmark ran on, as the JSON describes it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PROBE = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"


def describe() -> dict[str, Any]:
    """`{"cpu", "cores", "memory_bytes", "torch", "device", "load_average"}`; `device` is None without a GPU."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": version("torch"),
        "device": device(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of a package, found without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> str | None:
    """The name of the first CUDA device; asked in a process of its own, because the harness never imports torch."""
    if (version("torch") or "+cpu").endswith("+cpu") or not any(Path("/dev").glob("nvidia[0-9]*")):
        return None
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
    return found.stdout.strip() or None


def device_count() -> int:
    """How many CUDA devices there are."""
    if device() is None:
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return int(found.stdout or 0)


def in_words(machine: dict[str, Any]) -> str:
    """One line for the terminal: load average and machine, before anything is measured."""
    memory = machine["memory_bytes"] / 2**30
    on = f", {machine['device']}" if machine["device"] else ""
    return (
        f"load average {machine['load_average']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{memory:.0f} GiB{on}, torch {machine['torch']}"
    )
