"""A system under test as the harness holds it: launched by its own launcher, asked over sockets, always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.line import ADDRESS, Line, Message
from bench.rounds import Lost

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "SHARDWISE_BENCH_TOKEN"


class Subject:
    """One system: the processes that `command` starts, and a line to each of its `ranks`.

    Every process that inherits the environment carries a token, so that `close` finds what left the process group.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, ranks: int, env: Mapping[str, str], log: Path | None = None
    ) -> None:
        self.name = name
        self.command = list(command)
        self.ranks = ranks
        self.env = dict(env)
        self.facts: Message = {}
        self.lines: list[Line] = []
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.log = log or Path(self._folder.name) / "log"
        self._token = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, deadline_s: float) -> None:
        """Launch it and wait until every rank has connected. Raises Lost when that fails or takes longer."""
        address = str(Path(self._folder.name) / "line")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door, open(self.log, "wb") as log:
            door.bind(address)
            door.listen(self.ranks)
            env = environment() | self.env | {ADDRESS: address, TOKEN: self._token}
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            self._accept(door, deadline_s)

    def run(self, steps: int, deadline_s: float) -> list[Message]:
        """Let every rank do `steps` steps; each answers `{"seconds": [...], "losses": [...]}`. Raises Lost."""
        return self._ask({"do": "run", "steps": steps}, deadline_s)

    def checksums(self, deadline_s: float) -> list[float]:
        """What every rank's `checksum()` returns. Raises Lost."""
        return [float(answer["checksum"]) for answer in self._ask({"do": "checksum"}, deadline_s)]

    def pids(self) -> list[int]:
        """Every process of this system that is alive now."""
        own = [self._process.pid] if self._process and self._process.poll() is None else []
        return sorted({*own, *_carrying(self._token)})

    def close(self, grace_s: float = 15.0) -> None:
        """Ask the ranks to stop, give the launcher `grace_s` to end by itself, then kill whatever is left."""
        self.dismiss()
        process = self._process
        if process is not None:
            end = time.monotonic() + grace_s
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if number is not None and process.poll() is None:
                    _signal_group(process.pid, number)
                    end = time.monotonic() + 3
                _wait(process, end)
            _signal_group(process.pid, signal.SIGKILL)
            _sweep(self._token)
            process.wait()
            self._process = None
        self._folder.cleanup()

    def dismiss(self) -> None:
        """Tell the ranks to stop, without waiting for it."""
        for line in self.lines:
            try:
                line.send({"do": "stop"})
            except OSError:
                continue
            finally:
                line.close()
        self.lines = []

    def tail(self, characters: int = 400) -> str:
        """The end of what it printed, in one line."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return " ".join(text.split())[-characters:]

    def _accept(self, door: socket.socket, deadline_s: float) -> None:
        assert self._process is not None
        found: dict[int, Line] = {}
        end = time.monotonic() + deadline_s
        door.settimeout(0.2)
        while len(found) < self.ranks:
            if time.monotonic() > end:
                raise Lost(f"hung: {len(found)} of {self.ranks} ranks after {deadline_s:.0f} s; {self.tail()}")
            if self._process.poll() is not None and not _carrying(self._token):
                raise Lost(f"ended with status {self._process.returncode} before it was ready; {self.tail()}")
            try:
                connection, _ = door.accept()
            except TimeoutError:
                continue
            line = Line(connection)
            hello = line.receive(5.0)
            if hello is None or hello["world"] != self.ranks:
                raise Lost(f"said {hello} where {self.ranks} ranks were asked for; {self.tail()}")
            found[hello["rank"]] = line
            self.facts |= {key: value for key, value in hello.items() if key not in ("rank", "world", "pid")}
        self.lines = [found[rank] for rank in sorted(found)]

    def _ask(self, command: Message, deadline_s: float) -> list[Message]:
        end = time.monotonic() + deadline_s
        answers: list[Message] = []
        try:
            for line in self.lines:
                line.send(command)
            for line in self.lines:
                answer = line.receive(max(0.0, end - time.monotonic()))
                if answer is None:
                    raise Lost(f"died; {self.tail()}")
                answers.append(answer)
        except TimeoutError:
            raise Lost(f"hung: no answer within {deadline_s:.0f} s") from None
        except OSError as error:
            raise Lost(f"died ({error}); {self.tail()}") from None
        if not answers:
            raise Lost("was not started")
        return answers


def environment() -> dict[str, str]:
    """What every system gets: one thread a rank, loopback, this checkout on the path, and nothing that phones home."""
    env = dict(os.environ)
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if Path("/sys/class/net/lo").exists():
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def close_all(subjects: Iterable[Subject]) -> None:
    """End several systems: all are asked first, so that they end side by side."""
    chosen = list(subjects)
    for subject in chosen:
        subject.dismiss()
    for subject in chosen:
        subject.close()


def _wait(process: subprocess.Popen[bytes], end: float) -> None:
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _carrying(token: str) -> list[int]:
    """Processes whose environment has the token (Linux; elsewhere the process group is all there is)."""
    marker = f"{TOKEN}={token}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _sweep(token: str, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while (left := _carrying(token)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
