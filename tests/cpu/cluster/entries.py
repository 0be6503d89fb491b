"""What the ranks of these tests run, and a launcher to send signals to. Standard library only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shardwise.cluster.local import Zygote
from shardwise.cluster.ranks import run_ranks
from shardwise.errors import DataError

HERE = "tests.cpu.cluster.entries"
WAIT_S = 20.0


def until(condition: Callable[[], object], limit_s: float = WAIT_S) -> bool:
    """Whether `condition` became true within the limit."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def pids_in(folder: Path) -> list[int]:
    """The processes that told their pid with `_here`."""
    return [int(path.name[4:]) for path in folder.glob("pid-*")]


def _here(folder: str) -> None:
    Path(folder, f"pid-{os.getpid()}").touch()


def report(folder: str, name: str = "report", listen_fd: int | None = None, **rest: object) -> None:
    """Write down what this process sees of itself."""
    seen = {
        "pid": os.getpid(),
        "session": os.getsid(0),
        "group": os.getpgrp(),
        "env": dict(os.environ),
        "path": sys.path,
        "cwd": os.getcwd(),
        "threads": len(os.listdir("/proc/self/task")),
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "sigint": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "json_was_there": "json" in sys.modules,
        "fds": sorted(os.listdir("/proc/self/fd")),
        "listening": _address(listen_fd),
        "inheritable": listen_fd is not None and os.get_inheritable(listen_fd),
        "rest": rest,
    }
    Path(folder, name).write_text(json.dumps(seen))


def _address(fd: int | None) -> list[object] | None:
    if fd is None:
        return None
    import socket

    with socket.socket(fileno=os.dup(fd)) as listener:
        return list(listener.getsockname())


def reports(rank: int, folder: str, **rest: object) -> None:
    report(folder, f"report-{rank}", rank=rank, **rest)  # type: ignore[arg-type]


def speak() -> None:
    print("out \u00e4")
    print("err", file=sys.stderr)
    subprocess.run(["echo", "from a child"], check=True)
    sys.stdout.write("no newline")


def leave(how: str, **place: object) -> None:
    """End this process in the named way."""
    ways: dict[str, Callable[[], object]] = {
        "return": lambda: None,
        "exit": lambda: sys.exit(7),
        "exit text": lambda: sys.exit("a last word"),
        "exit none": lambda: sys.exit(),
        "raise": lambda: 1 // 0,
        "error": lambda: _raise(DataError("the folder is empty. Put files in it.")),
        "sigsegv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }
    ways[how]()


def _raise(error: Exception) -> None:
    raise error


def at_exit(folder: str) -> None:
    import atexit

    atexit.register(Path(folder, "left").touch)


def sleep(folder: str, **place: object) -> None:
    _here(folder)
    time.sleep(600)


def stubborn(folder: str, **place: object) -> None:
    """Takes no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _here(folder)
    while True:
        time.sleep(600)


def with_worker(folder: str, **place: object) -> None:
    """Leaves a process of its own behind, as a loader with workers would."""
    worker = subprocess.Popen(["sleep", "600"])
    Path(folder, f"pid-{worker.pid}").touch()
    os._exit(0)


def one_fails(rank: int, folder: str, how: str, **place: object) -> None:
    """Rank 1 ends as told, once all are there; the others wait."""
    _here(folder)
    if rank == 1:
        until(lambda: len(pids_in(Path(folder))) == place["world"])
        leave(how)
    time.sleep(600)


def one_fails_one_is_stubborn(rank: int, folder: str, how: str, stubborn: bool, **place: object) -> None:
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    one_fails(rank, folder, how, **place)


def launcher(entry: str, folder: str, ranks: str, grace_s: str, method: str) -> None:
    """A launcher process for the tests to send signals to; writes the ranks' ends to `exits.json`."""
    starter = Zygote.start(("json",), method=method)  # type: ignore[arg-type]
    exits = run_ranks(
        starter,
        f"{HERE}:{entry}",
        lambda rank: {"folder": folder},
        int(ranks),
        logs=Path(folder, "logs"),
        grace_s=float(grace_s),
    )
    starter.close()
    seen = {
        "stop_signal": exits.stop_signal,
        "signals": [end.signal for end in exits],
        "failed": exits.failure() is not None,
    }
    Path(folder, "exits.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    launcher(*sys.argv[1:])
