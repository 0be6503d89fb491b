"""What a rank does from its start to its end: join the mesh, load the kept job or the user's script, run it."""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from shardwise import events
from shardwise.comm.mesh import Mesh, connect
from shardwise.comm.store import open_store
from shardwise.errors import RunError
from shardwise.parallel.blame import user_code
from shardwise.spec import files
from shardwise.spec.plan import Plan
from shardwise.train import capture, context
from shardwise.train.data import prepare
from shardwise.train.folder import RunFolder
from shardwise.train.run import Trainer
from shardwise.train.state import Saver, State

JOIN_LIMIT_S = 120.0


def main(*, rank: int, world: int, port: int, listen_fd: int | None, run: str, script: list[str] | None = None) -> None:
    """The entry of every launched rank. `run` is its run folder; with `script`, that file and its arguments are run."""
    context.mark_launched()
    folder = RunFolder(Path(run))
    plan = files.load(folder.path / "plan.json", Plan)
    began = time.perf_counter()
    store = open_store(listen_fd, port, rank, world, JOIN_LIMIT_S) if world > 1 else None
    mesh = connect(plan, rank=rank, world=world, store=store, device=context.device_of(rank))
    if world > 1:
        torch.distributed.barrier()  # a rank that has little to do must not leave while others still connect
    with closing(mesh), recorded(folder, mesh):
        events.emit("rank_ready", rank=rank, seconds=time.perf_counter() - began, threads=torch.get_num_threads())
        if script is not None:
            context.enter(context.Context(mesh, folder))
            run_script(script)
        else:
            run_job(folder, mesh)


def run_job(folder: RunFolder, mesh: Mesh) -> State:
    """Train the kept copy of the folder's job on this rank."""
    source, record = folder.source(), folder.record()
    function = capture.load_function(source, original=record.original)
    job = capture.build(function, capture.bind(function, record.parameters), folder=source.folder)
    if mesh.plan.exact:
        torch.set_num_threads(1)  # the same batch with another number of threads has other bits
    prepared = prepare(job)
    with ExitStack() as stack:
        if job.log and mesh.rank == 0:
            from shardwise.observe.trackers import tracker

            for name in job.log:
                kept = tracker(name, folder.path)
                stack.callback(kept.close)
                stack.enter_context(events.sink(kept))
        trainer = Trainer(job, mesh.plan, mesh, prepared, Saver(folder, mesh, job))
        stack.callback(trainer.close)
        return trainer.train()


def run_script(argv: list[str]) -> None:
    """Run a user's script as `__main__` in this process, as Python itself would."""
    before, sys.argv = sys.argv, list(argv)
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    try:
        with user_code(f"the script {Path(argv[0]).name}", folder=str(Path(argv[0]).resolve().parent)):
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.argv = before


@contextmanager
def recorded(folder: RunFolder, mesh: Mesh) -> Iterator[None]:
    """Append this rank's events to the run's file: what its axes use, what it exchanged, and how it ended."""
    lines = events.JsonLines(folder.events)
    with events.sink(lines):
        if mesh.rank == 0:
            events.emit("connected", axes=mesh.axes())
        try:
            yield
        except BaseException as error:
            if not isinstance(error, SystemExit) or error.code:
                events.emit("rank_failed", rank=mesh.rank, kind=type(error).__name__, message=str(error))
            raise
        finally:
            with suppress(RunError):  # a full disk has been reported by whatever was written before
                events.emit("wire", rank=mesh.rank, groups=mesh.traffic())
            lines.close()


@contextmanager
def closing(mesh: Mesh) -> Iterator[None]:
    """Close the mesh together when all went well; abort it, so that nobody waits, when this rank failed."""
    try:
        yield
    except BaseException:
        mesh.abort()
        raise
    mesh.close()


def environment(argv: dict[str, Any]) -> Path:
    """One rank started by torchrun, Slurm or MPI: rank 0 opens the run folder (`argv` is what `api.train` was told)."""
    from shardwise.train.api import open_run

    mesh = context.current().mesh
    with closing(mesh):
        path = open_run(**argv, ranks=mesh.world) if mesh.rank == 0 else None
        folder = RunFolder(Path(context.agree(mesh, str(path) if path else "")))
        mesh.obey(files.load(folder.path / "plan.json", Plan))
        began = time.perf_counter()
        with recorded(folder, mesh):
            status, step = "failed", 0
            try:
                step = run_job(folder, mesh).step
                status = "finished"
            finally:
                if mesh.rank == 0:
                    events.emit("run_finished", step=step, seconds=time.perf_counter() - began, status=status)
    return folder.path
