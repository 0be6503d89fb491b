"""Ranks that torchrun, Slurm or MPI started."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.cluster.env import EnvLauncher, Placement, expand_hosts, from_environment
from shardwise.cluster.launch import LAUNCHERS
from shardwise.errors import ClusterError

HERE = "tests.pure.cluster.test_env"

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "12345",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-4711@1",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


def entry(folder: str, listen_fd: int | None, **rest: object) -> None:
    """What a rank of these tests runs: it writes down what it was given."""
    listening = None
    if listen_fd is not None:
        with socket.socket(fileno=listen_fd) as listener:
            listening = listener.getsockname()
    Path(folder, "seen").write_text(json.dumps({"rest": rest, "listening": listening}))


def place(environ: dict[str, str]) -> Placement:
    found = from_environment(environ)
    assert found is not None
    return found


def test_no_launcher() -> None:
    assert from_environment({"WORLD_SIZE": "4", "HOME": "/root"}) is None


def test_torchrun() -> None:
    assert place(TORCHRUN) == Placement(
        rank=3,
        world=4,
        local_rank=1,
        local_world=2,
        master_addr="10.0.0.1",
        master_port=29400,
        launcher="torchrun",
        agent_store=True,
    )


def test_slurm() -> None:
    found = place(SLURM)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (5, 8, 1, 4)
    assert (found.master_addr, found.launcher, found.agent_store) == ("gpu07", "Slurm", False)
    assert place({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port == found.master_port
    assert place({**SLURM, "SLURM_JOB_ID": "12346"}).master_port != found.master_port
    assert 10_000 <= found.master_port < 30_000
    assert place({**SLURM, "MASTER_PORT": "777", "MASTER_ADDR": "10.1.1.1"}).master_addr == "10.1.1.1"


def test_slurm_with_unlike_nodes() -> None:
    uneven = {**SLURM, "SLURM_NTASKS": "6", "SLURM_NODELIST": "a,b,c", "SLURM_TASKS_PER_NODE": "1(x2),4"}
    assert [place({**uneven, "SLURM_NODEID": str(node)}).local_world for node in range(3)] == [1, 1, 4]


def test_slurm_on_one_host_meets_on_loopback() -> None:
    found = place({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "login"})
    assert (found.local_world, found.master_addr) == (2, "127.0.0.1")


def test_a_step_of_a_larger_slurm_job() -> None:
    found = place(
        {**SLURM, "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_TASKS_PER_NODE": "6"}
    )
    assert (found.world, found.local_world, found.master_addr) == (6, 6, "127.0.0.1")


def test_mpirun_inside_a_slurm_allocation_is_mpiruns() -> None:
    batch_step = {**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert place({**batch_step, **OPEN_MPI}).rank == 1
    assert place({**batch_step, **MPICH, "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}).rank == 1


@pytest.mark.parametrize(("environ", "name"), [(OPEN_MPI, "Open MPI"), (MPICH, "MPICH")])
def test_mpi_on_one_host(environ: dict[str, str], name: str) -> None:
    found = place(environ)
    assert (found.launcher, found.world, found.local_world, found.master_addr) == (name, 2, 2, "127.0.0.1")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 with 4 ranks: ranks count from 0 to 3"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT='' is not a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, "several hosts, and MASTER_ADDR is not set"),
    ],
)
def test_what_is_wrong_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        from_environment(environ)


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("", []),
        ("one", ["one"]),
        ("a,b", ["a", "b"]),
        ("a[1-3,07],b", ["a1", "a2", "a3", "a07", "b"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1]-ib,b[2,4].x", ["a1-ib", "b2.x", "b4.x"]),
    ],
)
def test_slurms_short_form(short: str, hosts: list[str]) -> None:
    assert expand_hosts(short) == hosts


@given(st.integers(0, 900), st.integers(0, 30), st.integers(1, 5))
def test_a_range_of_hosts_has_them_all(first: int, more: int, width: int) -> None:
    word = f"{first:0{width}d}"
    found = expand_hosts(f"n[{word}-{first + more:0{width}d}]")
    assert found == [f"n{number:0{width}d}" for number in range(first, first + more + 1)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_the_entry_runs_here_as_the_rank_that_the_environment_says(tmp_path: Path) -> None:
    environ = dict(MPICH, MASTER_PORT=str(free_port()))
    launcher = LAUNCHERS["env"](environ)
    exits = launcher.run(f"{HERE}:entry", lambda rank: {"folder": str(tmp_path), "mine": rank}, 2, logs=tmp_path)
    launcher.close()
    seen: dict[str, Any] = json.loads((tmp_path / "seen").read_text())
    port = int(environ["MASTER_PORT"])
    assert seen["rest"] == {"rank": 0, "world": 2, "port": port, "mine": 0}
    assert seen["listening"] == ["127.0.0.1", port]
    assert [(end.rank, end.status) for end in exits] == [(0, 0)]
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["GLOO_SOCKET_IFNAME"]) == ("0", "2", "lo")


def test_under_torchrun_the_agents_store_is_used(tmp_path: Path) -> None:
    environ = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}
    EnvLauncher(environ).run(f"{HERE}:entry", lambda rank: {"folder": str(tmp_path)}, 4, logs=tmp_path)
    assert json.loads((tmp_path / "seen").read_text())["listening"] is None
    assert "GLOO_SOCKET_IFNAME" not in environ  # two hosts: not loopback


def test_outside_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="torchrun --nproc-per-node 2"):
        EnvLauncher({}).run(f"{HERE}:entry", lambda rank: {}, 2, logs=tmp_path)


def test_a_plan_for_another_number_of_ranks(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="the plan has 3 ranks, but MPICH started 2"):
        EnvLauncher(dict(MPICH)).run(f"{HERE}:entry", lambda rank: {}, 3, logs=tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = dict(MPICH, MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(ClusterError, match="cannot listen at MASTER_ADDR=127.0.0.1"):
            EnvLauncher(environ).run(f"{HERE}:entry", lambda rank: {}, 2, logs=tmp_path)
