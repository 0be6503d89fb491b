"""All ranks of one run: start them, watch them, end them together, and tell how each one ended."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from msgspec import Struct

from shardwise import errors
from shardwise.cluster.discover import usable_cores
from shardwise.cluster.process import Starter
from shardwise.cluster.supervision import KILL_LIMIT_S, Supervision
from shardwise.errors import ClusterError, ShardwiseError

LOOPBACK = "127.0.0.1"
_LOG_TAIL_LINES = 12


class RankError(Struct, frozen=True, kw_only=True):
    """The exception that ended a rank; `kind` is the name of its class."""

    kind: str
    message: str
    exit_code: int


class RankExit(Struct, frozen=True, kw_only=True):
    """How a rank ended.

    `status` is its exit code, or minus the number of the signal whose name is in `signal`. `ended_by_launcher` says
    that it was told to stop because of another rank or the user. `error` is the exception that it left, if any.
    """

    rank: int
    pid: int
    status: int
    signal: str | None = None
    ended_by_launcher: bool = False
    error: RankError | None = None
    log: str = ""

    @property
    def failed(self) -> bool:
        """Whether the rank failed by itself."""
        return self.status != 0 and (self.error is not None or not self.ended_by_launcher)

    def describe(self) -> str:
        """`rank 1 (pid 4711) was ended by SIGSEGV`, or the like."""
        who = f"rank {self.rank} (pid {self.pid})"
        if self.signal:
            hint = ", perhaps for lack of memory" if self.signal == "SIGKILL" and not self.ended_by_launcher else ""
            return f"{who} was ended by {self.signal}{hint}"
        if self.error:
            return f"{who} failed with {self.error.kind}: {self.error.message}"
        return f"{who} ended with exit status {self.status}"


class RankExits(list[RankExit]):
    """The ranks' ends in the order in which they came. `stop_signal` is the signal that asked the run to stop."""

    stop_signal: int | None = None

    @property
    def first_failure(self) -> RankExit | None:
        """The rank to blame: the first that failed by itself, ranks that only lost touch with another one last."""
        failures = [found for found in self if found.failed]
        causes = [found for found in failures if found.error is None or found.error.kind != "CommError"]
        return next(iter(causes or failures), None)

    def failure(self) -> ShardwiseError | None:
        """The error to raise for these ends, None where no rank failed.

        A rank's own ShardwiseError comes back as the same class with the same message; anything else is a
        ClusterError that says which rank failed first, how, and what its log says.
        """
        found = self.first_failure
        if found is None:
            return None
        kind = getattr(errors, found.error.kind, None) if found.error else None
        if found.error and isinstance(kind, type) and issubclass(kind, ShardwiseError):
            return kind(found.error.message)
        others = ", ".join(map(str, sorted(end.rank for end in self if end is not found)))
        rest = f" Ranks {others} were ended after it." if others else ""
        return ClusterError(f"{found.describe()}.{rest} Its log is {found.log}; the end of it:\n{_tail(found.log)}")


def run_ranks(
    starter: Starter,
    entry: str,
    args_of_rank: Callable[[int], Mapping[str, Any]],
    ranks: int,
    *,
    logs: Path,
    on_poll: Callable[[], None] = lambda: None,
    grace_s: float = 5.0,
    poll_s: float = 0.1,
    cores: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RankExits:
    """Run `entry` as `ranks` processes of this host and return when all have ended.

    Each is called as `entry(rank=, world=, port=, listen_fd=, **args_of_rank(rank))`: rank 0 gets the descriptor of a
    socket that listens on loopback for the ranks' store, all get its port; a single rank gets neither (0 and None).
    Output goes to `logs/rank-N.log`. `on_poll` is called every `poll_s` seconds and once after the last end; what it
    raises ends the ranks and comes through. The first failing rank, SIGINT or SIGTERM end all: SIGTERM, SIGKILL after
    `grace_s`; a second signal kills at once. The caller reads `stop_signal` of the result. No rank outlives this call.
    Raises ClusterError where a rank cannot be started or cannot be killed.
    """
    watch = Supervision(ranks, grace_s)
    found = RankExits()
    rank_of: dict[int, int] = {}
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(
            f"cannot write the ranks' logs to {logs}: {error.strerror}. Choose another folder."
        ) from None
    with _stop_signals(watch):
        try:
            _start(starter, entry, args_of_rank, ranks, logs, max(1, (cores or usable_cores()) // ranks), rank_of)
            while watch.live:
                for pid, status in starter.wait(poll_s):
                    if pid in rank_of:
                        watch.exited(rank_of[pid], status, clock())
                        found.append(_exit(rank_of.pop(pid), pid, status, watch, logs))
                on_poll()
                _act(starter, watch, rank_of, clock())
        finally:
            _kill(starter, rank_of, clock)
    found.stop_signal = watch.stop_signal
    return found


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch and its launchers call a rank's place, for scripts that read it; gloo is kept on loopback."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }


def _start(
    starter: Starter,
    entry: str,
    args_of_rank: Callable[[int], Mapping[str, Any]],
    ranks: int,
    logs: Path,
    threads: int,
    rank_of: dict[int, int],
) -> None:
    listener = socket.create_server((LOOPBACK, 0), backlog=max(128, ranks)) if ranks > 1 else None
    port = listener.getsockname()[1] if listener else 0
    try:
        for rank in range(ranks):
            error_file = _error_file(logs, rank)
            error_file.unlink(missing_ok=True)
            args = {"rank": rank, "world": ranks, "port": port, "listen_fd": None, **args_of_rank(rank)}
            process = starter.fork(
                entry,
                args,
                env=rank_environment(rank, ranks, port),
                threads=threads,
                stdout=_log(logs, rank),
                fds={"listen_fd": listener.fileno()} if listener and rank == 0 else {},
                error_file=error_file,
            )
            rank_of[process.pid] = rank
    finally:
        if listener:
            listener.close()


def _act(starter: Starter, watch: Supervision, rank_of: dict[int, int], now: float) -> None:
    action = watch.decide(now)
    if action in ("terminate", "kill"):
        for pid in rank_of:
            starter.signal(pid, signal.SIGTERM if action == "terminate" else signal.SIGKILL)
    elif action == "give_up":
        stuck = ", ".join(f"{rank} (pid {pid})" for pid, rank in rank_of.items())
        rank_of.clear()
        raise ClusterError(
            f"rank {stuck} is still there {KILL_LIMIT_S:.0f} s after SIGKILL. Look for a stuck device or disk."
        )


def _kill(starter: Starter, rank_of: dict[int, int], clock: Callable[[], float]) -> None:
    """Kill and collect the ranks that an exception left behind."""
    limit = clock() + KILL_LIMIT_S
    with suppress(ClusterError):  # a zygote that died has taken its ranks along, and its error is on the way already
        for pid in rank_of:
            starter.signal(pid, signal.SIGKILL)
        while rank_of and clock() < limit:
            for pid, _ in starter.wait(0.1):
                rank_of.pop(pid, None)


@contextmanager
def _stop_signals(watch: Supervision) -> Iterator[None]:
    """SIGINT and SIGTERM stop the run instead of this process; only the main thread can take signals over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        watch.stop(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}  # as nohup and & ask
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number, old in ours.items():
            signal.signal(number, old)


def _exit(rank: int, pid: int, status: int, watch: Supervision, logs: Path) -> RankExit:
    return RankExit(
        rank=rank,
        pid=pid,
        status=status,
        signal=signal.Signals(-status).name if status < 0 else None,
        ended_by_launcher=rank in watch.terminated,
        error=_read_error(_error_file(logs, rank)),
        log=str(_log(logs, rank)),
    )


def _read_error(path: Path) -> RankError | None:
    try:
        return RankError(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _log(logs: Path, rank: int) -> Path:
    return logs.absolute() / f"rank-{rank}.log"


def _error_file(logs: Path, rank: int) -> Path:
    return logs.absolute() / f"rank-{rank}.error.json"


def _tail(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(empty)"
