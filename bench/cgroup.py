"""Run a command under a limit on its memory that counts the file cache too: `python -m bench.cgroup BYTES COMMAND ...`.

It gets a control group of its own below that of this process (Linux, as root). Where none can be made it runs without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
NAME = "shardwise-bench-"
LIMITS = ("memory.limit_in_bytes", "memory.max")
PEAKS = ("memory.max_usage_in_bytes", "memory.peak")


def main(limit_bytes: int, command: Sequence[str]) -> int:
    """The command's exit status."""
    group = make(limit_bytes)
    if group is None:
        return subprocess.call(command)
    (group / "cgroup.procs").write_text(str(os.getpid()))  # before the command begins, so that all of it counts
    try:
        return subprocess.call(command)
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def make(limit_bytes: int) -> Path | None:
    """A new group with this limit, None where none can be made."""
    for own in _own():
        group = own / f"{NAME}{os.getpid()}"
        try:
            group.mkdir()
            _first(group, LIMITS).write_text(str(limit_bytes))
            return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def charged() -> dict[str, int]:
    """Of the group that this process was put into: its limit, and the most that was ever charged to it (anonymous
    memory, file cache, kernel memory) in bytes; empty without one."""
    for own in _own():
        if own.name.startswith(NAME):
            limit, peak = (int(_first(own, names).read_text()) for names in (LIMITS, PEAKS))
            return {"group_limit": limit, "group_peak": peak}
    return {}


def _first(group: Path, names: Sequence[str]) -> Path:
    return next((group / name for name in names if (group / name).exists()), group / names[0])


def _own() -> Iterator[Path]:
    """The memory groups that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, own = line.split(":", 2)
        if controllers == "memory" and V1.is_dir():
            yield V1 / own.lstrip("/")
        elif number == "0" and (V2 / "cgroup.controllers").exists():
            yield V2 / own.lstrip("/")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
