"""The machine this runs on as a `Cluster`: cores and memory within a container's limits, GPUs, their speed."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from msgspec import Struct

from shardwise import events
from shardwise.cluster.links import kept, link_of
from shardwise.cluster.process import Starter
from shardwise.comm.kernel import TRANSPORT, library
from shardwise.errors import ClusterError
from shardwise.spec.cluster import Cluster, Device, Node

_SMI_LIMIT_S = 20.0
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number just below 2^63


class Gpu(Struct, frozen=True, kw_only=True):
    """One GPU as the driver lists it."""

    index: int
    uuid: str
    name: str
    memory_bytes: int

    @property
    def kind(self) -> str:
        """`NVIDIA H100 80GB HBM3` -> `h100`, `NVIDIA GeForce RTX 4090` -> `rtx4090`."""
        return gpu_kind(self.name)


def discover(*, probe: bool = True, starter: Starter | None = None, cache: Path | None = None) -> Cluster:
    """This machine as a cluster of one node: its GPUs, or one device a core where there is none.

    With `probe` the peak FLOP/s of each dtype and the memory bandwidth are measured in a child process (a process of
    `starter`, which saves the import of torch, or a fresh one), in two seconds a kind of device; the result is kept in
    `cache` (default: the user's cache folder). Without it, a kept result is used and nothing is measured. This process
    imports no torch. What `shardwise cluster calibrate` measured here comes along: links and collectives of the
    transport that ranks would use. Raises ClusterError where the probe fails.
    """
    from shardwise.cluster.probe import machine_key, speeds

    cores, memory = usable_cores(), usable_memory()
    gpus = find_gpus()
    kinds = sorted({gpu.kind for gpu in gpus})
    measured = speeds(cpu_model(), cores, kinds, cache=cache, starter=starter, probe=probe)
    if gpus:
        devices = tuple(_device(gpu.kind, gpu.memory_bytes, measured.get(gpu.kind)) for gpu in gpus)
    else:
        devices = (_device("cpu", memory // cores, measured.get("cpu")),) * cores
    backend = "nccl" if gpus else host_transport()
    calibrations = kept(machine_key(cpu_model(), cores, kinds), backend, cache=cache)
    node = Node(
        devices=devices,
        link=link_of(calibrations, backend),
        name=platform.node() or "localhost",
        cores=cores,
        memory_bytes=memory,
    )
    return Cluster(nodes=(node,), calibrations=calibrations)


def host_transport() -> str:
    """What carries tensors in host memory between the ranks of this host: `shm`, `shm-torch` or `gloo`."""
    wanted = os.environ.get(TRANSPORT, "auto")
    if wanted == "gloo" or sys.platform != "linux":
        return "gloo"
    return "shm" if library() and wanted != "shm-torch" else "shm-torch"


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [allowed]
    for folder in _control_groups(root, "cpu"):
        quota, period = _cpu_quota(folder)
        if quota > 0 and period > 0:
            quotas.append(quota // period)
    return max(1, min(quotas))


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process and its ranks may use: the machine's, or less by its control group's limit."""
    limits = [_total_memory(root)]
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(_text(folder / name).strip())
            if 0 < limit < _UNLIMITED:
                limits.append(limit)
    return min(limits)


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name as the system gives it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def find_gpus(command: str = "nvidia-smi") -> list[Gpu]:
    """GPUs that this process may use, in the driver's order or CUDA_VISIBLE_DEVICES's. No CUDA is initialised."""
    query = [command, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=False)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired) as error:
        events.emit("warning", message=f"{command} did not answer ({error}); this machine's GPUs are not used.")
        return []
    if answer.returncode != 0:
        return []
    return visible(parse_gpus(answer.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(table: str) -> list[Gpu]:
    """Rows of `index, uuid, name, memory in MiB` -> GPUs; a GPU that does not tell its memory is left out."""
    found = []
    for row in csv.reader(table.splitlines(), skipinitialspace=True):
        if len(row) == 4 and _number(row[3]) > 0:
            found.append(Gpu(index=_number(row[0]), uuid=row[1], name=row[2], memory_bytes=_number(row[3]) << 20))
    return found


def visible(gpus: list[Gpu], choice: str | None) -> list[Gpu]:
    """Those of `gpus` that CUDA_VISIBLE_DEVICES=`choice` (None: unset) leaves, as CUDA reads it.

    CUDA takes indices or beginnings of UUIDs, and ignores everything from the first one that does not exist.
    """
    if choice is None:
        return gpus
    found: list[Gpu] = []
    for word in (part.strip() for part in choice.split(",")):
        match = [gpu for gpu in gpus if word and (word == str(gpu.index) or gpu.uuid.startswith(word))]
        if not match:
            break
        found.append(match[0])
    return found


def gpu_kind(name: str) -> str:
    """A GPU's marketing name -> the short kind by which plans and clusters know it."""
    words = re.sub(r"\b(nvidia|tesla|geforce|quadro)\b", " ", name.lower()).replace("-", " ").split()
    if words[:1] == ["rtx"] and len(words) > 1:
        return "".join(words[:2])
    return words[0] if words else "gpu"


def _device(kind: str, memory_bytes: int, speed: dict[str, float] | None) -> Device:
    if speed is None:
        return Device(kind=kind, memory_bytes=memory_bytes)
    peak = {name: value for name, value in speed.items() if name != "memory_bandwidth"}
    return Device(
        kind=kind,
        memory_bytes=memory_bytes,
        peak_flops=peak,
        memory_bandwidth=speed.get("memory_bandwidth", 0.0),
        measured=True,
    )


def _total_memory(root: Path) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError) as error:
        raise ClusterError(f"this system does not tell how much memory it has ({error}).") from None


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and of all above it, versions 1 and 2: the limit of any of them holds."""
    base = root / "sys/fs/cgroup"
    found: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = base
        elif controller in controllers.split(","):
            top = base / controllers if (base / controllers).is_dir() else base / controller
        else:
            continue
        folder = top / path.strip("/")
        found += [folder, *folder.parents[: len(folder.parts) - len(top.parts)]]
    return found


def _cpu_quota(folder: Path) -> tuple[int, int]:
    """Microseconds of CPU time a period, and the period; zeros where there is no limit."""
    words = _text(folder / "cpu.max").split()
    if len(words) == 2:
        return _number(words[0]), _number(words[1])
    return _number(_text(folder / "cpu.cfs_quota_us").strip()), _number(_text(folder / "cpu.cfs_period_us").strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(word: str) -> int:
    return int(word) if re.fullmatch(r"-?\d+", word) else 0
