"""Host memory between steps: what one step frees, the next one takes again without asking the system."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

# glibc's mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MMAP_ABOVE_BYTES = 1 << 30
NEVER = 2**31 - 1
OTHERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")


def give_back_freed_memory() -> None:
    """Let glibc give to the system what is free in the process; on other C libraries nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep freed memory in the process; True where it does.

    By default it gives large blocks back to the system at once, so every step faults its activations and gradients in
    again, page by page (25,000 faults a step for a GPT of 9 M parameters with 8 x 256 tokens). Does nothing on other C
    libraries, and where the user has chosen an allocator or its thresholds.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "threshold" in tunables or any(name in environ for name in OTHERS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(MMAP_THRESHOLD, MMAP_ABOVE_BYTES)) and bool(library.mallopt(TRIM_THRESHOLD, NEVER))
