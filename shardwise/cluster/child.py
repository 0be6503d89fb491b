"""What runs in a forked or spawned process: settle into the new process, call the entry, leave with a status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any, NoReturn

from shardwise.errors import ShardwiseError

_PR_SET_PDEATHSIG = 1


def run(request: dict[str, Any], fds: list[int], *, parent: int) -> NoReturn:
    """Do what `process.request` built, and end the process: 0, the error's `exit_code`, or 1 with a traceback.

    `parent` is the process whose death must end this one.
    """
    status = 1
    try:
        status = _run(request, fds, parent)
    except BaseException:  # this process must not return into its parent's program
        _print_traceback()
    finally:
        _flush()
        os._exit(status)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux; elsewhere a pipe is watched)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


def _run(request: dict[str, Any], fds: list[int], parent: int) -> int:
    import atexit

    atexit._clear()  # what the parent registered is the parent's to do
    try:
        args = _settle(request, fds, parent)
        module_name, _, path = request["entry"].partition(":")
        function: Any = _import(module_name)
        for name in path.split("."):
            function = getattr(function, name)
        function(**args)
        return 0
    except SystemExit as stop:
        return _exit_code(stop.code)
    except ShardwiseError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        _record(request["error_file"], error, error.exit_code)
        return error.exit_code
    except BaseException as error:
        _print_traceback()
        _record(request["error_file"], error, 1)
        return 1
    finally:
        atexit._run_exitfuncs()


def _settle(request: dict[str, Any], fds: list[int], parent: int) -> dict[str, Any]:
    """Make this process its own: death with the parent, process group, signals, environment, output, threads."""
    # A terminal's Ctrl-C reaches the launcher only, and the whole group can be ended at once. All ranks stay in one
    # session: where cores are shared among sessions (sched_autogroup_enabled) they could not give way to each other.
    if os.getpid() != os.getpgrp():
        os.setpgid(0, 0)
    die_with(parent)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    threads = request["threads"]
    os.environ.clear()
    os.environ.update(request["env"])
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    sys.path[:] = request["path"]
    os.chdir(request["cwd"])
    if request["stdout"] is not None:
        _redirect(request["stdout"])
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
    for fd in fds:
        os.set_inheritable(fd, False)
    return {**request["args"], **dict(zip(request["fd_names"], fds, strict=True))}


def _redirect(path: str) -> None:
    import faulthandler

    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, fd)
        stream.reconfigure(line_buffering=True, encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    os.close(log)
    faulthandler.enable(file=2)  # a crash in native code then leaves its Python stack in the log


def _import(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _exit_code(code: object) -> int:
    """What the interpreter itself would make of `raise SystemExit(code)`."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _record(path: str | None, error: BaseException, exit_code: int) -> None:
    """Leave `{"kind", "message", "exit_code"}` for the launcher, whole or not at all."""
    if path is None:
        return
    report = {"kind": type(error).__name__, "message": str(error), "exit_code": exit_code}
    part = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):  # a full disk must not change the exit status
        with open(part, "w", encoding="utf-8") as out:
            json.dump(report, out)
        os.replace(part, path)


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk or a closed stream must not change the exit status
            continue
