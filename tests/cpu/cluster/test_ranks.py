"""All ranks of a run, as real processes: places, ends, signals, and that nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.cluster.launch import LAUNCHERS
from shardwise.cluster.local import Zygote
from shardwise.cluster.process import Starter
from shardwise.cluster.ranks import run_ranks
from shardwise.errors import ClusterError, DataError
from tests.cpu.cluster.entries import HERE, WAIT_S, alive, pids_in, until

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def starter() -> Iterator[Starter]:
    found = Zygote.start(("json",))
    yield found
    found.close()


def test_each_rank_knows_its_place(starter: Starter, tmp_path: Path) -> None:
    exits = run_ranks(
        starter, f"{HERE}:reports", lambda rank: {"folder": str(tmp_path), "mine": rank * 10}, 3, logs=tmp_path, cores=7
    )
    assert sorted((end.rank, end.status) for end in exits) == [(0, 0), (1, 0), (2, 0)]
    assert exits.failure() is None
    assert exits.stop_signal is None
    seen = [json.loads((tmp_path / f"report-{rank}").read_text()) for rank in range(3)]
    port = seen[0]["listening"][1]
    assert [found["listening"] for found in seen] == [["127.0.0.1", port], None, None]
    for rank, found in enumerate(seen):
        assert found["rest"] == {"rank": rank, "world": 3, "port": port, "mine": rank * 10}
        env = found["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
            str(rank),
            str(rank),
            "3",
            "3",
        )
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", str(port))
        assert env["GLOO_SOCKET_IFNAME"] == "lo"
        assert env["OMP_NUM_THREADS"] == "2"  # 7 cores for 3 ranks


def test_a_single_rank_gets_no_socket(starter: Starter, tmp_path: Path) -> None:
    run_ranks(starter, f"{HERE}:reports", lambda rank: {"folder": str(tmp_path)}, 1, logs=tmp_path, cores=2)
    seen = json.loads((tmp_path / "report-0").read_text())
    assert seen["rest"] == {"rank": 0, "world": 1, "port": 0}
    assert seen["listening"] is None
    assert seen["env"]["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("how", "status", "kind", "says"),
    [
        ("raise", 1, ClusterError, r"rank 1 \(pid \d+\) failed with ZeroDivisionError.*Ranks 0, 2 were ended after it"),
        ("error", 4, DataError, r"^the folder is empty\. Put files in it\.$"),
        ("sigkill", -9, ClusterError, r"rank 1 .* was ended by SIGKILL, perhaps for lack of memory"),
        ("sigsegv", -11, ClusterError, r"rank 1 .* was ended by SIGSEGV"),
        ("exit", 7, ClusterError, r"rank 1 .* ended with exit status 7"),
    ],
)
def test_the_first_failing_rank_ends_the_others(
    starter: Starter, tmp_path: Path, how: str, status: int, kind: type[Exception], says: str
) -> None:
    args = {"folder": str(tmp_path), "how": how}
    exits = run_ranks(starter, f"{HERE}:one_fails", lambda rank: args, 3, logs=tmp_path / "logs")
    first = exits.first_failure
    assert first is not None
    assert (first.rank, first.status, first.ended_by_launcher) == (1, status, False)
    assert {(end.rank, end.signal, end.ended_by_launcher) for end in exits if end.rank != 1} == {
        (0, "SIGTERM", True),
        (2, "SIGTERM", True),
    }
    failure = exits.failure()
    assert type(failure) is kind
    with pytest.raises(kind, match=says):
        raise failure
    assert not any(map(alive, pids_in(tmp_path)))


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(starter: Starter, tmp_path: Path) -> None:
    def first_is_stubborn(rank: int) -> dict[str, Any]:
        return {"folder": str(tmp_path), "how": "exit", "stubborn": rank == 0}

    exits = run_ranks(
        starter, f"{HERE}:one_fails_one_is_stubborn", first_is_stubborn, 2, logs=tmp_path / "logs", grace_s=0.2
    )
    assert [(end.rank, end.signal) for end in exits] == [(1, None), (0, "SIGKILL")]


def test_what_on_poll_raises_ends_the_ranks_and_comes_through(starter: Starter, tmp_path: Path) -> None:
    def stop() -> None:
        if len(pids_in(tmp_path)) == 2:
            raise DataError("seen enough.")

    with pytest.raises(DataError, match="seen enough"):
        run_ranks(
            starter, f"{HERE}:stubborn", lambda rank: {"folder": str(tmp_path)}, 2, logs=tmp_path / "l", on_poll=stop
        )
    assert not any(map(alive, pids_in(tmp_path)))
    assert starter.wait(0.0) == []


def test_a_rank_that_cannot_be_started_ends_those_that_were(starter: Starter, tmp_path: Path) -> None:
    def no_third(rank: int) -> dict[str, Any]:
        if rank == 2:
            until(lambda: len(pids_in(tmp_path)) == 2)
            raise ClusterError("no third rank.")
        return {"folder": str(tmp_path)}

    with pytest.raises(ClusterError, match="no third rank"):
        run_ranks(starter, f"{HERE}:sleep", no_third, 3, logs=tmp_path / "logs")
    assert len(pids_in(tmp_path)) == 2
    assert not any(map(alive, pids_in(tmp_path)))


def test_a_zygote_that_dies_ends_the_run(tmp_path: Path) -> None:
    starter = Zygote.start(("json",), method="fork")
    assert isinstance(starter, Zygote)

    def kill_the_zygote() -> None:
        if len(pids_in(tmp_path)) == 2:
            os.kill(starter.pid, signal.SIGKILL)

    with pytest.raises(ClusterError, match="the zygote .* ended by SIGKILL"):
        run_ranks(
            starter,
            f"{HERE}:stubborn",
            lambda rank: {"folder": str(tmp_path)},
            2,
            logs=tmp_path / "logs",
            on_poll=kill_the_zygote,
        )
    assert until(lambda: not any(map(alive, pids_in(tmp_path))))
    starter.close()


def test_the_local_launcher(tmp_path: Path) -> None:
    launcher = LAUNCHERS["local"](("json",))
    exits = launcher.run(f"{HERE}:reports", lambda rank: {"folder": str(tmp_path)}, 2, logs=tmp_path)
    launcher.close()
    assert [end.status for end in exits] == [0, 0]
    assert (tmp_path / "report-1").exists()


def test_a_logs_folder_that_cannot_be_made(starter: Starter, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match="cannot write the ranks' logs to"):
        run_ranks(starter, f"{HERE}:sleep", lambda rank: {}, 1, logs=tmp_path / "file" / "logs")


class Launched:
    """A launcher in a process group of its own, as a shell starts it."""

    def __init__(
        self, folder: Path, entry: str, *, method: str = "fork", grace_s: float = 10.0, ranks: int = 2
    ) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", HERE, entry, str(folder), str(ranks), str(grace_s), method],
            cwd=ROOT,
            process_group=0,
        )
        assert until(lambda: len(pids_in(folder)) == ranks), "the ranks did not start"
        self.helpers = self._children()

    def _children(self) -> list[int]:
        pid = self.process.pid
        return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def exits(self) -> dict[str, Any]:
        self.process.wait(WAIT_S)
        found: dict[str, Any] = json.loads((self.folder / "exits.json").read_text())
        return found

    def all_gone(self) -> bool:
        return until(lambda: not any(map(alive, [*pids_in(self.folder), *self.helpers])))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_every_rank_in_order(tmp_path: Path, method: str, number: signal.Signals) -> None:
    launched = Launched(tmp_path, "sleep", method=method)
    os.killpg(launched.process.pid, number)  # what a terminal does: the whole foreground group
    assert launched.exits() == {"stop_signal": number, "signals": ["SIGTERM", "SIGTERM"], "failed": False}
    assert launched.all_gone()


def test_after_the_grace_ctrl_c_kills(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "stubborn", grace_s=0.3)
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.exits()["signals"] == ["SIGKILL", "SIGKILL"]
    assert launched.all_gone()


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "stubborn", grace_s=600)
    os.killpg(launched.process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        launched.process.wait(0.5)
    assert all(map(alive, pids_in(tmp_path)))
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.exits()["signals"] == ["SIGKILL", "SIGKILL"]
    assert launched.all_gone()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_launcher_killed_with_sigkill_leaves_no_process(tmp_path: Path, method: str) -> None:
    launched = Launched(tmp_path, "stubborn", method=method)
    launched.process.kill()
    launched.process.wait(WAIT_S)
    assert launched.all_gone()


def test_a_launcher_killed_while_the_zygote_imports_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import os; from shardwise.cluster.local import Zygote\n"
        "print(Zygote.start(('tests.cpu.cluster.slow_to_import', 'json')).pid, flush=True); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=WAIT_S, cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    zygote = int(run.stdout)
    assert until(lambda: not alive(zygote))


def test_a_stopped_zygote_does_not_outlive_its_launcher_either(tmp_path: Path) -> None:
    launched = Launched(tmp_path, "stubborn")
    (zygote,) = launched.helpers
    os.kill(zygote, signal.SIGSTOP)
    launched.process.kill()
    launched.process.wait(WAIT_S)
    os.kill(zygote, signal.SIGCONT)
    assert launched.all_gone()
