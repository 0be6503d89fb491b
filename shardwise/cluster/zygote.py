"""The zygote: a single-threaded process that imports what ranks need, forks them, and ends them with its parent.

Frames on its socket, both ways: four bytes of length, then a JSON object; descriptors travel with the length.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import sysconfig
import time
from collections.abc import Sequence
from typing import Any

from shardwise.cluster import child

_LENGTH = struct.Struct("!I")
_MAX_FDS = 16
_PARENT_CHECK_S = 1.0
_REAP_LIMIT_S = 5.0
# Only the import sees these: OpenBLAS and its like would start their threads while they load.
_ONE_THREAD = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}


def send(channel: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Write one frame. Raises OSError where the other end is gone."""
    body = json.dumps(message).encode()
    head = _LENGTH.pack(len(body))
    if fds:
        socket.send_fds(channel, [head], list(fds))
        channel.sendall(body)
    else:
        channel.sendall(head + body)


def receive(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Read one frame and its descriptors; `(None, [])` where the other end is gone."""
    try:
        head, fds, _, _ = socket.recv_fds(channel, _LENGTH.size, _MAX_FDS)
        head += _exactly(channel, _LENGTH.size - len(head)) if head else b""
        if not head:
            return None, []
        return json.loads(_exactly(channel, _LENGTH.unpack(head)[0])), list(fds)
    except (ConnectionError, EOFError):
        return None, []


def thread_count() -> int:
    """Threads of this process, native ones included (Linux)."""
    return len(os.listdir("/proc/self/task"))


def library_first(path: Sequence[str]) -> list[str]:
    """The path with Python's own and installed packages before all else: a job's profile.py must not be what torch
    imports by that name."""
    paths = sysconfig.get_paths()
    library = tuple({paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
    return sorted(path, key=lambda entry: not entry.startswith(library))


def main(fd: int) -> None:
    """Serve the parent at the other end of `fd` until it closes that end or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    hello, _ = receive(channel)
    if hello is None:
        return
    sys.path[:] = library_first(hello["path"])
    server = _Server(channel, hello["parent"])
    try:
        started = time.monotonic()
        failure = server.preload(hello["preload"])
        send(channel, {"event": "ready", "failure": failure, "seconds": time.monotonic() - started})
        if not failure:
            server.serve()
    except ConnectionError:  # the parent is gone
        pass
    finally:
        server.end()
    os._exit(0)  # the interpreter's own way out takes a tenth of a second with torch loaded


class _Server:
    def __init__(self, channel: socket.socket, parent: int) -> None:
        self._channel = channel
        self._parent = parent
        self._children: set[int] = set()
        self._threads_of = ""
        self._wake_read, self._wake_write = socket.socketpair()

    def preload(self, names: Sequence[str]) -> str:
        """Import `names` in order; the reason where that failed, else ''. Remembers who first started a thread."""
        os.environ.update(_ONE_THREAD)
        gc.disable()  # saves a tenth of the import, and leaves no holes that a later collection would write into
        for name in names:
            if os.getppid() != self._parent:
                raise BrokenPipeError
            try:
                importlib.import_module(name)
            except Exception as error:
                return f"importing '{name}' in the zygote failed with {type(error).__name__}: {error}"
            if not self._threads_of and thread_count() > 1:
                self._threads_of = name
        gc.freeze()
        return ""

    def serve(self) -> None:
        self._wake_write.setblocking(False)
        self._wake_read.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._wake_write.fileno())
        while os.getppid() == self._parent:
            readable, _, _ = select.select([self._channel, self._wake_read], [], [], _PARENT_CHECK_S)
            if self._wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            self._reap()
            if self._channel in readable:
                message, fds = receive(self._channel)
                if message is None:
                    return
                self._obey(message, fds)

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["op"] == "fork":
            self._fork(message, fds)
        elif message["op"] == "signal" and message["pid"] in self._children:
            os.kill(message["pid"], message["signal"])  # not reaped yet, so the number is still this process's

    def _fork(self, message: dict[str, Any], fds: list[int]) -> None:
        refusal = self._unsafe()
        if refusal:
            send(self._channel, {"event": "refused", "why": refusal})
        else:
            zygote = os.getpid()
            gc.freeze()
            pid = os.fork()
            if pid == 0:
                self._become_child(message, fds, zygote)
            self._children.add(pid)
            send(self._channel, {"event": "forked", "pid": pid})
        for fd in fds:
            os.close(fd)

    def _become_child(self, message: dict[str, Any], fds: list[int], zygote: int) -> None:
        try:
            signal.set_wakeup_fd(-1)
            for end in (self._channel, self._wake_read, self._wake_write):
                end.close()
            gc.enable()
        finally:
            child.run(message, fds, parent=zygote)

    def _unsafe(self) -> str:
        """Why forking now would be unsafe, or ''."""
        if thread_count() > 1:
            blame = f"importing '{self._threads_of}' started a thread" if self._threads_of else "a thread was started"
            return f"{blame} in the zygote, and forking a process with threads can deadlock. Do not preload that module"
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return (
                "a preloaded module initialised CUDA in the zygote, and CUDA does not survive a fork. Do not preload it"
            )
        return ""

    def _reap(self) -> None:
        for pid, status in _reap(self._children):
            send(self._channel, {"event": "exit", "pid": pid, "status": status})

    def end(self) -> None:
        """Kill what still runs and wait for it."""
        signal.set_wakeup_fd(-1)
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        limit = time.monotonic() + _REAP_LIMIT_S
        while self._children and time.monotonic() < limit:
            if not _reap(self._children):
                time.sleep(0.005)


def _reap(children: set[int]) -> list[tuple[int, int]]:
    """Collect the children that ended, with what is left of their process groups; `(pid, exit status)` of each."""
    ended = []
    for pid in sorted(children):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # workers that the rank left behind; its number is not free before waitpid
        _, status = os.waitpid(pid, 0)
        ended.append((pid, os.waitstatus_to_exitcode(status)))
        children.discard(pid)
    return ended


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
