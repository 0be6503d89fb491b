"""Two network namespaces of this host with several wires between them, each as slow as asked for. Linux, root.

a  10.88.0.1 [link0]============[link0] 10.88.0.2  b      a veth pair each, with tc tbf at both ends
   10.88.1.1 [link1]============[link1] 10.88.1.2
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bench.rounds import Lost

PREFIX = "swlinks"  # namespaces are called PREFIX-PID-NUMBERa and b
SPACES = Path("/run/netns")
QUEUE_MS = 50  # how much a sender's queue holds before it drops
BURST_MS = 1.3  # what leaves at once, in milliseconds of the rate
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count(1)


def unavailable() -> str | None:
    """Why this host cannot lay such wires, and what to do; None where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's; run it on Linux"
    if os.geteuid() != 0:
        return "shaped network namespaces need root; run it as root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"apt-get install iproute2 (there is no {program})"
    try:
        with Links([1000]):
            return None
    except Lost as lost:
        return f"network namespaces are not allowed here: {lost}"


class Links:
    """The namespaces and a wire of each of `rates_mbit` between them, for a `with` block. Raises Lost.

    Both go at the end of the block; those of a process that was killed go when the next one begins.
    """

    def __init__(self, rates_mbit: Sequence[int]) -> None:
        self.rates_mbit = tuple(rates_mbit)
        base = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.names = (f"{base}a", f"{base}b")
        self.devices = tuple(f"link{i}" for i in range(len(self.rates_mbit)))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Links:
        _remove_stale()
        with contextlib.ExitStack() as stack:
            for name in self.names:
                stack.callback(_remove, name)
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            for i, rate in enumerate(self.rates_mbit):
                self._lay(i, rate)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def address(self, end: int, wire: int = 0) -> str:
        return f"10.88.{wire}.{end + 1}"

    def inside(self, end: int) -> list[str]:
        """What to put in front of a command so that it runs at an end (0 or 1)."""
        return ["ip", "netns", "exec", self.names[end]]

    def enter(self, end: int) -> None:
        """Move the calling thread, and what it starts from now on, to an end. Raises OSError."""
        with open(SPACES / self.names[end]) as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def _lay(self, i: int, rate: int) -> None:
        device = self.devices[i]
        ends = [["netns", name] for name in self.names]
        _run("ip", "link", "add", device, *ends[0], "type", "veth", "peer", "name", device, *ends[1])
        burst = max(4000, int(rate * 1e6 / 8 * BURST_MS / 1e3))
        for end, name in enumerate(self.names):
            ip = ("ip", "-n", name)
            # A packet that the kernel has joined and that is larger than the burst would be cut up again by the queue.
            _run(*ip, "link", "set", device, "gso_max_size", str(max(3000, min(65000, burst - 2000))))
            shaped = ("rate", f"{rate}mbit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms")
            _run("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", *shaped)
            _run(*ip, "addr", "add", f"{self.address(end, i)}/24", "dev", device)
            _run(*ip, "link", "set", device, "up")
            # Hosts differ in their default; a namespace may only choose by route.
            _run(*ip, "route", "change", f"10.88.{i}.0/24", "dev", device, "congctl", "cubic")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        raise Lost(f"'{' '.join(command)}' did not end within 20 s") from None
    if done.returncode:
        raise Lost(f"'{' '.join(command)}' failed: {' '.join(done.stderr.split()) or done.returncode}")


def _remove(name: str) -> None:
    with contextlib.suppress(Lost):
        _run("ip", "netns", "del", name)


def _remove_stale() -> None:
    """Those whose process is gone."""
    for space in SPACES.glob(f"{PREFIX}-*") if SPACES.is_dir() else ():
        if not Path(f"/proc/{space.name.split('-')[1]}").exists():
            _remove(space.name)
