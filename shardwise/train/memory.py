"""Peak memory of this process, as its operating system or its device counts it."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_bytes(device: str) -> int:
    """The most bytes this rank ever held: allocated on a CUDA device, resident in a CPU process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
