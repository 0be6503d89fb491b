"""`shardwise cluster calibrate`: ranks measure each other over the transport that training would use."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import msgspec

from shardwise.cluster.discover import cpu_model, discover, find_gpus, usable_cores
from shardwise.cluster.links import cluster_of, keep
from shardwise.cluster.probe import machine_key
from shardwise.cluster.ranks import run_ranks
from shardwise.errors import SpecError
from shardwise.spec import files
from shardwise.spec.cluster import Cluster
from shardwise.spec.plan import Plan
from shardwise.train import start

JOIN_LIMIT_S, MEASURE_LIMIT_S = 120.0, 60.0


class Calibrated(msgspec.Struct, frozen=True, kw_only=True):
    """The machines with what was measured, where that was written, and how long it took."""

    cluster: Cluster
    written: tuple[Path, ...]
    seconds: float


def calibrate(
    *, ranks: int | None = None, on: Literal["local", "env"] = "local", out: str | Path | None = None
) -> Calibrated | None:
    """Measure all pairs of ranks and each collective; None on ranks of a foreign launcher but the first.

    `ranks` (default: one a device) are started here; with `on="env"` they are those that torchrun, Slurm or MPI
    started. The figures are kept for later plans and runs on this machine, and written to the cluster file `out` (ranks
    on several hosts: `cluster.json` unless given). Raises SpecError, ClusterError, CommError.
    """
    if on not in ("local", "env"):
        raise SpecError(f"--on {on} is not a place to run on; use local, or env under torchrun, Slurm or MPI.")
    began = time.perf_counter()
    found = _here(ranks) if on == "local" else _under_launcher(ranks)
    if found is None:
        return None
    several = len(found.nodes) > 1
    written = [] if several else [keep(_machine(), found.calibrations[0])]
    target = Path(out) if out is not None else Path("cluster.json") if several else None
    if target is not None:
        _save(found, target)
        written.append(target)
    return Calibrated(cluster=found, written=tuple(written), seconds=time.perf_counter() - began)


def _here(ranks: int | None) -> Cluster | None:
    with closing(start.take()) as starter, tempfile.TemporaryDirectory(prefix="shardwise-") as scratch:
        machine = discover(starter=starter)  # measures and keeps the devices' speeds, where that is still to do
        count = ranks or len(machine.devices)
        if count < 2:
            raise SpecError(
                f"--ranks {count}: two ranks at least measure each other. This machine has {len(machine.devices)} "
                f"device(s) ({machine.devices[0].kind}); ask for more ranks with --ranks 2."
            )
        out = Path(scratch) / "cluster.json"
        entry = "shardwise.train.calibrate:main"
        exits = run_ranks(starter, entry, lambda rank: {"out": str(out)}, count, logs=Path(scratch))
        failure = exits.failure()
        if exits.stop_signal:
            raise KeyboardInterrupt
        if failure is not None:
            raise failure
        return files.load(out, Cluster)


def main(*, rank: int, world: int, port: int, listen_fd: int | None, out: str) -> None:
    """The entry of every rank that is started here; the first one writes the Cluster to `out`."""
    from shardwise.comm.mesh import connect
    from shardwise.comm.store import open_store
    from shardwise.train.context import device_of

    store = open_store(listen_fd, port, rank, world, JOIN_LIMIT_S)
    device = device_of(rank)
    mesh = connect(Plan(data=world), rank=rank, world=world, store=store, device=device, timeout_s=MEASURE_LIMIT_S)
    found = measure(mesh)
    if rank == 0:
        files.save(found, out)
    mesh.close()


def measure(mesh: Any) -> Cluster:
    """What the ranks of `mesh` measure of each other, and their machines. Collective; the same on every rank."""
    from shardwise.comm.calibrate import calibrate as measured
    from shardwise.comm.collectives import gather_bytes

    group = mesh.axis("batch").group
    calibration = measured(group, mesh.device)
    told = gather_bytes(msgspec.json.encode(discover(probe=False)), group, mesh.device)
    return cluster_of([msgspec.json.decode(raw, type=Cluster).nodes[0] for raw in told], calibration)


def _under_launcher(ranks: int | None) -> Cluster | None:
    from shardwise.train import context

    mesh = context.current().mesh
    if mesh.world < 2 or ranks not in (None, mesh.world):
        raise SpecError(
            f"{mesh.world} rank(s) were started, but "
            + ("two at least measure each other." if mesh.world < 2 else f"--ranks {ranks} was asked for.")
            + " Start as many as you want to measure, such as: torchrun --nproc-per-node 2 -m shardwise cluster "
            "calibrate --on env."
        )
    found = measure(mesh)
    mesh.close()
    return found if mesh.rank == 0 else None


def _machine() -> str:
    return machine_key(cpu_model(), usable_cores(), sorted({gpu.kind for gpu in find_gpus()}))


def _save(found: Cluster, target: Path) -> None:
    try:
        files.save(found, target)
    except OSError as error:
        raise SpecError(f"--out {target} cannot be written: {error.strerror}. Choose another place.") from None
