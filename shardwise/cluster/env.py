"""Ranks that somebody else started (torchrun, Slurm, MPI): find this process's place, and run the entry in it."""

from __future__ import annotations

import importlib
import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from shardwise.cluster.ranks import LOOPBACK, RankExit, RankExits, rank_environment
from shardwise.errors import ClusterError

_PORTS = (10_000, 30_000)  # below the range from which Linux takes ports for outgoing connections


class Placement(Struct, frozen=True, kw_only=True):
    """Where this process stands among the ranks that `launcher` started.

    With `agent_store` the launcher already serves a store at `master_addr:master_port`; else rank 0 has to.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    launcher: str
    agent_store: bool = False


class _Names(Struct, frozen=True):
    """The variables in which a launcher tells a rank its place; of several the first that is set counts."""

    launcher: str
    rank: str
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]
    job: tuple[str, ...] = ()


# Order matters: mpirun inside a Slurm allocation sees Slurm's variables too, and they describe the batch step.
_LAUNCHERS = (
    _Names("torchrun", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    _Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"),
    ),
    _Names(
        "MPICH",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        ("SLURM_JOB_ID", "PMI_JOBID"),
    ),
    _Names(
        "Slurm",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        (),
        ("SLURM_JOB_ID", "SLURM_JOBID"),
    ),
)


def from_environment(environ: Mapping[str, str]) -> Placement | None:
    """This process's place by the variables of torchrun, Open MPI, MPICH or Slurm; None where none of them is set.

    Raises ClusterError that names the variable where one is missing, no number or out of range, and where ranks on
    several hosts are not told where to meet (MASTER_ADDR; Slurm's list of nodes will do).
    """
    names = next((names for names in _LAUNCHERS if names.rank in environ), None)
    if names is None:
        return None
    rank, world = _need(environ, names, (names.rank,)), _need(environ, names, names.world)
    if not 0 <= rank < world:
        raise ClusterError(f"{names.rank}={rank} with {world} ranks: ranks count from 0 to {world - 1}.")
    hosts = _slurm_hosts(environ) if names.launcher in ("Slurm", "MPICH") else []
    local_world = _local_world(environ, names, world, hosts)
    local_rank = _optional(environ, names, names.local_rank)
    if local_rank is None:
        if local_world != world:
            raise ClusterError(
                f"{names.local_rank[0]} is not set, so this rank cannot tell which device of its host to use."
            )
        local_rank = rank
    address = environ.get("MASTER_ADDR") or _address(names, hosts, local_world == world)
    return Placement(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        master_addr=address,
        master_port=_port(environ, names),
        launcher=names.launcher,
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def expand_hosts(nodelist: str) -> list[str]:
    """Slurm's short form of a list of hosts: `a[1-3,07],b` -> `a1 a2 a3 a07 b` (`scontrol show hostnames`)."""
    return [host for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist) for host in _expand(word)]


class EnvLauncher:
    """Runs the entry in this process, as the rank that its environment says it is."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ

    def placement(self) -> Placement:
        """This process's place. Raises ClusterError outside a launcher."""
        found = from_environment(self._environ)
        if found is None:
            raise ClusterError(
                "--on env expects to be started by torchrun, srun or mpirun, and none of RANK, SLURM_PROCID, "
                "OMPI_COMM_WORLD_RANK and PMI_RANK is set. Put the launcher in front, such as "
                "'torchrun --nproc-per-node 2 -m shardwise train job.py --on env', or leave --on away."
            )
        return found

    def run(
        self,
        entry: str,
        args_of_rank: Callable[[int], Mapping[str, Any]],
        ranks: int,
        *,
        logs: Path,
        on_poll: Callable[[], None] = lambda: None,
        grace_s: float = 5.0,
    ) -> RankExits:
        """See `Launcher.run`. Only this process's rank: the others, logs and signals are the outer launcher's.

        The entry's exceptions come through.
        """
        place = self.placement()
        if place.world != ranks:
            raise ClusterError(
                f"the plan has {ranks} ranks, but {place.launcher} started {place.world}. "
                f"Start {ranks} ranks, or change the plan."
            )
        self._environ.update(_exports(place))
        module, _, name = entry.partition(":")
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        listener = _listen(place) if place.rank == 0 and place.world > 1 and not place.agent_store else None
        fd = listener.detach() if listener else None  # the store owns it from here on
        function(
            **{
                "rank": place.rank,
                "world": ranks,
                "port": place.master_port,
                "listen_fd": fd,
                **args_of_rank(place.rank),
            }
        )
        return RankExits([RankExit(rank=place.rank, pid=os.getpid(), status=0)])

    def close(self) -> None:
        """Nothing to release: the processes are the outer launcher's."""


def _exports(place: Placement) -> dict[str, str]:
    exports = rank_environment(place.rank, place.world, place.master_port)
    exports |= {
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "MASTER_ADDR": place.master_addr,
    }
    if place.local_world != place.world:
        del exports["GLOO_SOCKET_IFNAME"]  # ranks on several hosts do not meet on loopback
    return exports


def _listen(place: Placement) -> socket.socket:
    """A socket at the meeting point itself, and at no other address of this host."""
    try:
        return socket.create_server((place.master_addr, place.master_port), backlog=max(128, place.world))
    except OSError as error:
        raise ClusterError(
            f"rank 0 cannot listen at MASTER_ADDR={place.master_addr}, MASTER_PORT={place.master_port}: {error}. "
            "Set them, equal for all ranks, to an address of rank 0's host and a free port."
        ) from None


def _need(environ: Mapping[str, str], names: _Names, choices: tuple[str, ...]) -> int:
    value = _optional(environ, names, choices)
    if value is None:
        raise ClusterError(
            f"{names.rank} is set but {choices[0]} is not. Start the ranks with {names.launcher}, or set both."
        )
    return value


def _optional(environ: Mapping[str, str], names: _Names, choices: tuple[str, ...]) -> int | None:
    name = next((name for name in choices if name in environ), None)
    if name is None:
        return None
    if not re.fullmatch(r"\d+", environ[name]):
        raise ClusterError(f"{name}='{environ[name]}' is not a whole number. It is {names.launcher}'s to set.")
    return int(environ[name])


def _local_world(environ: Mapping[str, str], names: _Names, world: int, hosts: list[str]) -> int:
    known = _optional(environ, names, names.local_world)
    if known is not None:
        return known
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    if hosts and per_node:
        counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))]
        node = _optional(environ, names, ("SLURM_NODEID",)) or 0
        return counts[node] if node < len(counts) else counts[-1]
    return world if len(hosts) < 2 else -(-world // len(hosts))


def _slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return expand_hosts(listed or "")


def _address(names: _Names, hosts: list[str], one_host: bool) -> str:
    if one_host:
        return LOOPBACK
    if hosts:
        return hosts[0]
    raise ClusterError(
        f"{names.launcher} started ranks on several hosts, and MASTER_ADDR is not set. "
        "Set it for all ranks to the address of rank 0's host."
    )


def _port(environ: Mapping[str, str], names: _Names) -> int:
    """MASTER_PORT, or a number that all ranks of the job, and hardly another job, work out alike."""
    given = _optional(environ, names, ("MASTER_PORT",))
    if given is not None:
        return given
    job = next((environ[name] for name in names.job if name in environ), "")
    first, last = _PORTS
    return first + zlib.crc32(f"{job}.{environ.get('SLURM_STEP_ID', '')}".encode()) % (last - first)


def _expand(word: str) -> list[str]:
    found = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", word)
    if found is None:
        return [word]
    middles: list[str] = []
    for part in found[2].split(","):
        first, dash, last = part.partition("-")
        middles += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if dash else [part]
    return [found[1] + middle + rest for middle in middles for rest in _expand(found[3])]
