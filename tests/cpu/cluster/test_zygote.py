"""Starting, settling and ending processes: the zygote, and the spawn path with the same interface."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.cluster.local import Zygote, method_here
from shardwise.cluster.process import Exit, Starter
from shardwise.errors import ClusterError
from tests.cpu.cluster.entries import HERE, WAIT_S, alive, pids_in, until

NO = "tests.cpu.cluster.no_such_module"


@pytest.fixture(params=["fork", "spawn"])
def starter(request: pytest.FixtureRequest) -> Iterator[Starter]:
    found = Zygote.start(("json",), method=request.param)
    yield found
    found.close()


def run(starter: Starter, entry: str, args: dict[str, Any], **more: Any) -> int:
    more = {"env": {}, "threads": 1, "stdout": None, **more}
    process = starter.fork(f"{HERE}:{entry}", args, **more)
    return starter.wait_for(process.pid, WAIT_S)


def report(starter: Starter, folder: Path, **more: Any) -> dict[str, Any]:
    assert run(starter, "report", {"folder": str(folder)}, **more) == 0
    seen: dict[str, Any] = json.loads((folder / "report").read_text())
    return seen


def test_a_process_sees_the_callers_world(starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED_SINCE_THE_START", "yes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    before = dict(os.environ)
    seen = report(starter, tmp_path, env={"RANK": "3"}, threads=2)
    threads = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    assert seen["env"] == {**before, "RANK": "3", **threads}
    assert seen["path"][0] == str(tmp_path / "more")
    assert seen["cwd"] == str(tmp_path)


def test_a_process_stands_alone(starter: Starter, tmp_path: Path) -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        seen, other = report(starter, tmp_path), report(starter, tmp_path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert seen["group"] == seen["pid"] != os.getpgrp()
    assert seen["pid"] != other["pid"]
    assert seen["session"] == other["session"] not in (seen["pid"], other["pid"])  # they can give way to each other
    assert seen["sigterm"]
    assert seen["sigint"]
    assert seen["blocked"] == 0


def test_a_forked_process_has_the_preloaded_modules_one_thread_and_no_socket_of_the_zygote(tmp_path: Path) -> None:
    starter = Zygote.start(("json",), method="fork")
    try:
        seen = report(starter, tmp_path)
    finally:
        starter.close()
    assert seen["json_was_there"]
    assert seen["threads"] == 1
    assert len(seen["fds"]) == 4  # 0, 1, 2 and the one that lists them


def test_a_descriptor_travels(starter: Starter, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen = report(starter, tmp_path, fds={"listen_fd": listener.fileno()})
        assert seen["listening"] == list(listener.getsockname())
    assert not seen["inheritable"]


def test_output_goes_to_the_file(starter: Starter, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(starter, "speak", {}, stdout=log) == 0
    assert log.read_text(encoding="utf-8") == "out \u00e4\nerr\nfrom a child\nno newline"


@pytest.mark.parametrize(
    ("how", "status", "says", "error"),
    [
        ("return", 0, "", None),
        ("exit", 7, "", None),
        ("exit text", 1, "a last word", None),
        ("exit none", 0, "", None),
        ("raise", 1, "ZeroDivisionError", {"kind": "ZeroDivisionError", "exit_code": 1}),
        ("error", 4, "DataError: the folder is empty.", {"kind": "DataError", "exit_code": 4}),
        ("sigsegv", -signal.SIGSEGV, "Fatal Python error: Segmentation fault", None),
        ("sigkill", -signal.SIGKILL, "", None),
    ],
)
def test_how_a_process_ends(
    starter: Starter, tmp_path: Path, how: str, status: int, says: str, error: dict[str, Any] | None
) -> None:
    log, left = tmp_path / "log", tmp_path / "error.json"
    assert run(starter, "leave", {"how": how}, stdout=log, error_file=left) == status
    assert says in log.read_text()
    if error is None:
        assert not left.exists()
    else:
        found = json.loads(left.read_text())
        assert found.pop("message")
        assert found == error
    assert ("Traceback" in log.read_text()) == (how == "raise")


def test_what_was_registered_for_the_exit_runs(starter: Starter, tmp_path: Path) -> None:
    assert run(starter, "at_exit", {"folder": str(tmp_path)}) == 0
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize(("entry", "why"), [(f"{NO}:run", "No module named"), (f"{HERE}:nothing", "has no attribute")])
def test_an_entry_that_is_not_there(starter: Starter, tmp_path: Path, entry: str, why: str) -> None:
    log = tmp_path / "log"
    process = starter.fork(entry, {}, env={}, threads=1, stdout=log)
    assert starter.wait_for(process.pid, WAIT_S) == 1
    assert why in log.read_text()


def test_an_entry_must_be_a_module_and_a_function(starter: Starter) -> None:
    with pytest.raises(ClusterError, match=r"'json\.dumps' is not a 'package\.module:function'"):
        starter.fork("json.dumps", {}, env={}, threads=1, stdout=None)


def test_wait_reports_each_end_once_and_gives_up_in_time(starter: Starter, tmp_path: Path) -> None:
    sleeper = starter.fork(f"{HERE}:sleep", {"folder": str(tmp_path)}, env={}, threads=1, stdout=None)
    assert starter.wait(0.05) == []
    with pytest.raises(ClusterError, match="has not ended"):
        starter.wait_for(sleeper.pid, 0.05)
    quick = starter.fork(f"{HERE}:leave", {"how": "exit"}, env={}, threads=1, stdout=None)
    assert starter.wait(WAIT_S) == [Exit(quick.pid, 7)]
    assert until(lambda: pids_in(tmp_path))
    starter.signal(sleeper.pid, signal.SIGTERM)
    assert starter.wait(WAIT_S) == [Exit(sleeper.pid, -signal.SIGTERM)]
    assert starter.wait(0.05) == []
    starter.signal(sleeper.pid, signal.SIGTERM)  # it has ended: no effect, no error


def test_waiting_for_one_keeps_the_ends_of_others(starter: Starter) -> None:
    first = starter.fork(f"{HERE}:leave", {"how": "exit"}, env={}, threads=1, stdout=None)
    second = starter.fork(f"{HERE}:leave", {"how": "return"}, env={}, threads=1, stdout=None)
    assert starter.wait_for(second.pid, WAIT_S) == 0
    assert starter.wait_for(first.pid, WAIT_S) == 7


def test_workers_that_a_rank_left_behind_are_ended(starter: Starter, tmp_path: Path) -> None:
    assert run(starter, "with_worker", {"folder": str(tmp_path)}) == 0
    (worker,) = pids_in(tmp_path)
    assert until(lambda: not alive(worker))


def test_close_ends_even_a_process_that_ignores_sigterm(starter: Starter, tmp_path: Path) -> None:
    starter.fork(f"{HERE}:stubborn", {"folder": str(tmp_path)}, env={}, threads=1, stdout=None)
    assert until(lambda: pids_in(tmp_path))
    starter.close()
    assert not alive(pids_in(tmp_path)[0])
    starter.close()


def test_a_zygote_with_a_thread_refuses_to_fork_and_names_the_module() -> None:
    starter = Zygote.start(("json", "tests.cpu.cluster.thread_at_import", "csv"), method="fork")
    try:
        with pytest.raises(ClusterError, match=r"importing 'tests\.cpu\.cluster\.thread_at_import' started a thread"):
            starter.fork(f"{HERE}:speak", {}, env={}, threads=1, stdout=None)
    finally:
        starter.close()


def test_a_module_that_cannot_be_preloaded_is_reported() -> None:
    starter = Zygote.start(("json", NO), method="fork")
    try:
        with pytest.raises(ClusterError, match=rf"importing '{NO}' in the zygote failed with ModuleNotFoundError"):
            starter.fork(f"{HERE}:speak", {}, env={}, threads=1, stdout=None)
    finally:
        starter.close()


def test_a_killed_zygote_takes_its_processes_along_and_is_reported(tmp_path: Path) -> None:
    starter = Zygote.start((), method="fork")
    assert isinstance(starter, Zygote)
    starter.fork(f"{HERE}:stubborn", {"folder": str(tmp_path)}, env={}, threads=1, stdout=None)
    assert until(lambda: pids_in(tmp_path))
    os.kill(starter.pid, signal.SIGKILL)
    assert until(lambda: not alive(pids_in(tmp_path)[0]))
    with pytest.raises(ClusterError, match="ended by SIGKILL, and its ranks with it"):
        starter.wait(WAIT_S)
    starter.close()


def test_a_file_in_the_working_directory_does_not_shadow_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    starter = Zygote.start(("json",), method="fork")
    try:
        assert report(starter, tmp_path)["cwd"] == str(tmp_path)
    finally:
        starter.close()


def test_nor_does_one_beside_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profile.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    starter = Zygote.start(("cProfile",), method="fork")  # which imports profile
    try:
        assert report(starter, tmp_path)["path"][0] == str(tmp_path)  # the job's own imports find it
    finally:
        starter.close()


@pytest.mark.parametrize(("platform", "method"), [("linux", "fork"), ("darwin", "spawn")])
def test_the_method_is_the_platforms(monkeypatch: pytest.MonkeyPatch, platform: str, method: str) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert method_here() == method


def test_windows_is_told_of_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(ClusterError, match="WSL2"):
        method_here()
