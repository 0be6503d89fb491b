"""Two network namespaces of this host and the wire between them: as slow and as long as a case asks for. Linux, root.

    a  10.77.0.1 [wire]====================[wire] 10.77.0.2  b
       tc tbf limits what each end may send; a veth pair carries it, or, where it takes time, bench/delay.c

Whatever becomes of the harness, a janitor removes both: it waits for the end of a pipe that the harness holds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench.rounds import Lost

PREFIX = "swbench"  # namespaces are called PREFIX-PID-NUMBERa and b
_numbers = itertools.count(1)
DEVICE, ENDS = "wire", ("10.77.0.1", "10.77.0.2")
SPACES = Path("/run/netns")
QUEUE_MS = 50  # how much the sender's queue holds before it drops
# What leaves an end at once, and the largest packet (joined by the kernel, as a network card does it) that is handed to
# the queue: one larger than the burst would be cut up there, which costs a core at 100 Mbit/s. In bytes.
BURSTS = {10: (8_000, 6_000), 100: (16_000, 14_000), 1000: (128_000, 64_000)}


@dataclass(frozen=True)
class Wire:
    """`rate_mbit` each way, at once (None: as fast as the host); `delay_ms` one way."""

    rate_mbit: int | None = None
    delay_ms: int = 0

    def __str__(self) -> str:
        rate = "unshaped" if self.rate_mbit is None else f"{self.rate_mbit} Mbit"
        return f"{rate} {self.delay_ms} ms" if self.delay_ms else rate


@dataclass(frozen=True)
class Measured:
    """What a TCP connection over the wire gets: Mbit/s while both ends send, and a small message's round trip."""

    mbit_per_s: float
    round_trip_ms: float

    def __str__(self) -> str:
        return f"{self.mbit_per_s:,.4g} Mbit/s each way, {self.round_trip_ms:.3g} ms round trip"


def unavailable(wire: Wire = Wire()) -> str | None:
    """Why this host cannot lay such a wire, and what to do; None where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's; run it on Linux"
    if os.geteuid() != 0:
        return "run it as root: sudo python -m bench slow_link"
    for program in ("ip", "tc", "taskset"):
        if shutil.which(program) is None:
            return f"apt-get install iproute2 util-linux (there is no {program})"
    if wire.delay_ms and (compiler() is None or not Path("/dev/net/tun").exists()):
        return "a delay needs a C compiler (apt-get install gcc) and /dev/net/tun"
    try:
        with Link(wire):
            return None
    except Lost as lost:
        return f"allow network namespaces: {lost}"


def compiler() -> str | None:
    """The system's C compiler."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


class Link:
    """The namespaces and their wire, for the time of a `with` block. Raises Lost where they cannot be made."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.prefix = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.names = (f"{self.prefix}a", f"{self.prefix}b")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Link:
        remove_stale()
        with contextlib.ExitStack() as stack:
            stack.callback(_dismiss, _janitor(self.prefix))
            for name in self.names:
                run("ip", "netns", "add", name)
            if self.wire.delay_ms:
                self._emulate(stack)
            else:
                ends = [["netns", name] for name in self.names]
                run("ip", "link", "add", DEVICE, *ends[0], "type", "veth", "peer", "name", DEVICE, *ends[1])
            for name, address in zip(self.names, ENDS, strict=True):
                self._set_up(name, address)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def inside(self, end: int, core: int | None = None) -> list[str]:
        """What to put in front of a command so that it runs at an end (0 or 1), on one core."""
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        return ["ip", "netns", "exec", self.names[end], *pinned]

    def measure(self, seconds: float = 3.0) -> Measured:
        """Send over it for that long. Raises Lost."""
        program = [sys.executable, str(Path(__file__).with_name("link_probe.py")), ENDS[0], str(seconds)]
        limit_s = 4 * seconds + 20
        first = subprocess.Popen([*self.inside(0), *program, "listen"], stdout=subprocess.DEVNULL)
        try:
            found = run(*self.inside(1), *program, limit_s=limit_s)
            first.wait(limit_s)
        finally:
            first.kill()
            first.wait()
        return Measured(**json.loads(found))

    def _set_up(self, name: str, address: str) -> None:
        ip = ("ip", "-n", name)
        if self.wire.rate_mbit is not None:
            burst, largest = BURSTS[self.wire.rate_mbit]
            if not self.wire.delay_ms:  # TUN devices get single packets
                run(*ip, "link", "set", DEVICE, "gso_max_size", str(largest))
            limit = ("rate", f"{self.wire.rate_mbit}mbit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms")
            run("tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", "tbf", *limit)
        run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "-e")
        run(*ip, "addr", "add", f"{address}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            run(*ip, "link", "set", device, "up")
        # Hosts differ in their default; a namespace may only choose by route.
        run(*ip, "route", "change", "10.77.0.0/24", "dev", DEVICE, "congctl", "cubic")

    def _emulate(self, stack: contextlib.ExitStack) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        program = folder / "delay"
        source = Path(__file__).with_name("delay.c")
        run(str(compiler()), "-O2", "-o", str(program), str(source), limit_s=60)
        ends = [str(SPACES / name) for name in self.names]
        command = [str(program), *ends, DEVICE, str(self.wire.delay_ms * 1000)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        stack.callback(_dismiss, process)
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 10)
        said = process.stdout.readline().decode().strip() if ready else "no answer within 10 s"
        if said != "up":
            raise Lost(f"bench/delay.c could not make its devices: {said}")


def run(*command: str, limit_s: float = 20) -> str:
    """The standard output of a command. Raises Lost with what it complained about."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise Lost(f"'{' '.join(command)}' did not end within {limit_s:.0f} s") from None
    if done.returncode:
        raise Lost(f"'{' '.join(command)}' failed: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def remove_stale() -> None:
    """Remove the namespaces of harnesses that are no more."""
    for path in SPACES.glob(f"{PREFIX}-*"):
        pid = path.name.split("-")[1]
        if pid != str(os.getpid()) and not Path(f"/proc/{pid}").exists():
            remove(path.name)


def remove(prefix: str, limit_s: float = 10) -> None:
    """End every process in the namespaces whose names begin so, and remove these."""
    end = time.monotonic() + limit_s
    names = [path.name for path in SPACES.glob(f"{prefix}*")]
    while (pids := [int(p) for name in names for p in _pids(name)]) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for name in names:
        with contextlib.suppress(Lost):
            run("ip", "netns", "del", name)


def _pids(name: str) -> list[str]:
    with contextlib.suppress(Lost):
        return run("ip", "netns", "pids", name).split()
    return []


def _janitor(prefix: str) -> subprocess.Popen[bytes]:
    """In a session of its own: a terminal's Ctrl-C must not reach it."""
    command = [sys.executable, str(Path(__file__)), prefix]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)


def _dismiss(process: subprocess.Popen[bytes]) -> None:
    """Let a helper see the end of its input, and wait for it."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


if __name__ == "__main__":
    sys.stdin.read()
    remove(sys.argv[1])
