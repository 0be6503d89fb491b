"""The verbs as functions: `sw.plan`, `sw.train`, `sw.show`, `sw.sample`, `sw.evaluate`, `sw.export`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import msgspec

from shardwise import events
from shardwise.cluster.discover import discover
from shardwise.cluster.process import Starter
from shardwise.cluster.ranks import RankExits, run_ranks
from shardwise.errors import ClusterError, JobError, RunError, ShardwiseError, SpecError
from shardwise.observe import runs as known_runs
from shardwise.observe import summary as summaries
from shardwise.plan.explain import explain
from shardwise.plan.search import search, settled
from shardwise.plan.support import refuse_places, refuse_unbuilt
from shardwise.spec import files
from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan, build_plan, parse_plan
from shardwise.spec.profile import ModelProfile
from shardwise.train import capture, cells, start, verified
from shardwise.train.folder import RunFolder
from shardwise.train.probe import Probe, probe

Job = str | Path | Callable[..., Any]
Sets = Sequence[str] | Mapping[str, Any]


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `plan` found: the Plan and what it was chosen from."""

    plan: Plan
    profile: ModelProfile
    cluster: Cluster
    facts: JobFacts
    whole: dict[str, str] = {}  # what a tensor axis does not split, and why

    def text(self) -> str:
        """Several lines for a terminal."""
        return explain(self.plan, self.profile, self.cluster, self.facts, self.whole)

    def _repr_html_(self) -> str:
        from shardwise.observe.html import plan_html

        return plan_html(self.plan)


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `train` did: the run's folder, its summary and its status (`finished`, `stopped`)."""

    path: Path
    status: str
    summary: summaries.Summary
    exit_code: int = 0

    def _repr_html_(self) -> str:
        from shardwise.observe.html import summary_html

        return summary_html(self.summary)


def plan(
    job: Job, *, sets: Sets = (), plan: str | None = None, cluster: str | Path | None = None, **parameters: Any
) -> PlanReport:
    """What would happen here (or on the cluster of a file), and why. Raises SpecError, JobError, NoPlanFits."""
    fixed = parse_plan(plan or "")
    with closing(start.take()) as starter:
        split = (plan or "") if build_plan(dict(fixed)).tensor > 1 else ""
        found = _look(starter, _source(job), _sets(sets, parameters), cuts=_cuts(fixed), split=split)
        machines = files.load(cluster, Cluster) if cluster else discover(starter=starter)
    chosen = search(found.profile, machines, found.facts, fixed)
    chosen = msgspec.structs.replace(chosen, splits=found.splits or chosen.splits)
    return PlanReport(plan=chosen, profile=found.profile, cluster=machines, facts=found.facts, whole=found.whole)


def train(
    job: Job,
    *,
    sets: Sets = (),
    plan: str | None = None,
    on: Literal["local", "env"] = "local",
    resume: str | None = None,
    runs: str | Path = "runs",
    cluster: str | Path | None = None,
    display: bool = True,
    name: str | None = None,
    args: Sequence[str] = (),
    **parameters: Any,
) -> RunResult:
    """Train a job (a file, `file.py:function`, or a function) in new processes; returns when it has finished.

    A file without a job function is a script: every rank runs it, with `args`. Every call opens a new run folder in
    `runs`; `resume` (a run's name, path, or `latest`) goes on with an old one and refuses a changed job. The plan is
    made for the machines of the file `cluster`, or else for what is discovered here; `on` alone says where ranks run.
    Raises the ShardwiseError that ended the run.
    """
    _refuse_nested()
    if on not in ("local", "env"):
        raise SpecError(f"--on {on} is not a place to run on; use local, or env under torchrun, Slurm or MPI.")
    source = _source(job) if not isinstance(job, str | Path) else capture.find_job(str(job))
    if source is None and (resume or sets or parameters):
        raise SpecError(
            f"{job} is a script without a job function: it takes no --resume and no --set. Write a job for it."
        )
    if on == "env":
        return _train_here(job, sets, parameters, plan, resume, runs, name, cluster)
    with closing(start.take()) as starter:
        if source is None:
            return _run_script(starter, Path(str(job)), args, plan, Path(runs), display, name)
        told = (_sets(sets, parameters), plan, resume, Path(runs), name)
        folder, steps = prepare_run(starter, source, *told, cluster=cluster)
        return _launch(starter, folder, {}, display=display, steps=steps)


def verify(
    job: Job, *, sets: Sets = (), plan: str | None = None, steps: int = 3, **parameters: Any
) -> verified.Verified:
    """Run a small copy of the job as the plan says and on one device, in float64, and compare.

    The copy has the job's `small` parameters, if it names some, else fewer blocks and shorter texts; and a small batch.
    Raises SpecError for a plan that changes the numbers by its nature, NoPlanFits for one that the small model cannot
    have.
    """
    source, fixed = _source(job), parse_plan(plan or "")
    with closing(start.take()) as starter, tempfile.TemporaryDirectory(prefix="shardwise-") as scratch:
        found = _look(starter, source, _sets(sets, parameters), cuts=_cuts(fixed), small=True)
        machines = discover(probe=False)
        asked = build_plan(dict(fixed)) if fixed else search(found.profile, machines, found.facts)
        ran, batch = verified.shrunk(
            asked, found.facts, norms=found.profile.batch_norms, parts=len(found.profile.calls)
        )
        facts = msgspec.structs.replace(found.facts, global_batch=batch)
        chosen = settled(ran, found.profile, machines, facts)
        files.save(chosen, Path(scratch) / "plan.json")
        told = {
            "folder": scratch,
            "source": msgspec.to_builtins(source),
            "sets": found.parameters,
            "steps": steps,
            "global_batch": batch,
            "asked": str(asked),
        }
        entry = "shardwise.train.verify:entry"
        _ended(run_ranks(starter, entry, lambda rank: {"told": told}, ran.ranks, logs=Path(scratch)))
        return files.load(Path(scratch) / "verified.json", verified.Verified)


def show(run: str | Path = "latest", *, runs: str | Path = "runs") -> summaries.Summary:
    """The summary of a run; writes its `report.html`. Raises RunError when there is no such run."""
    from shardwise.observe.report import write_report

    path = known_runs.find_run(run, Path(runs))
    write_report(path)
    return summaries.read(path)


def sample(run: str | Path = "latest", prompt: str = "", **options: Any) -> Iterator[str]:
    """Pieces of text that the run's model goes on with after `prompt`; see `train.use.sample`."""
    from shardwise.train import use

    return use.sample(_folder(run, options.pop("runs", "runs")), prompt, **options)


def evaluate(run: str | Path = "latest", *, runs: str | Path = "runs", checkpoint: str = "latest") -> dict[str, float]:
    """Loss and metrics of a checkpoint on the job's held-out samples, computed in this process."""
    from shardwise.train import use

    return use.evaluate(_folder(run, runs), checkpoint=checkpoint)


def export(
    run: str | Path = "latest",
    *,
    to: Literal["safetensors", "dcp", "transformers"],
    out: str | Path,
    runs: str | Path = "runs",
    checkpoint: str = "latest",
) -> Path:
    """Write the run's weights in another format to `out`; returns its path. Raises CheckpointError."""
    from shardwise.train import use

    return use.export(_folder(run, runs), to=to, out=Path(out), checkpoint=checkpoint)


def prepare_run(
    starter: Starter | None,
    source: capture.JobSource,
    sets: Mapping[str, Any],
    plan_text: str | None,
    resume: str | None,
    root: Path,
    name: str | None,
    ranks: int | None = None,
    *,
    cluster: str | Path | None = None,
) -> tuple[RunFolder, int]:
    """Look at the job, choose its plan, and open its run folder (or the old one to resume); (folder, steps).

    `ranks` is their number where somebody else has started them already.
    """
    old = _folder(resume, root) if resume else None
    if old is not None:
        sets = {**old.record().parameters, **sets}
    fixed = parse_plan(plan_text or "")
    found = _look(starter, source, sets, cuts=_cuts(fixed))
    if old is not None:
        old.refuse_changed_job(found.sources, found.parameters)
    machines = files.load(cluster, Cluster) if cluster else discover(starter=starter)
    if old is not None:  # what decides the numbers stays as it was, on whatever number of ranks
        before = files.load(old.path / "plan.json", Plan)
        kept: dict[str, Any] = {"exact": before.exact, "precision": before.precision}
        if found.profile.batch_norms or before.pipeline == build_plan(dict(fixed)).pipeline:
            kept["microbatches"] = before.microbatches
        fixed = {**kept, **fixed}
    if ranks is not None:
        fixed = {"data": max(1, ranks // build_plan({**fixed, "data": 1}).ranks), **fixed}
    chosen = search(found.profile, machines, found.facts, fixed, started=ranks)
    if cluster and ranks is None:
        refuse_places(chosen, discover(probe=False))
    folder = old or RunFolder.create(root, name=name or source.function.replace("job", Path(source.path).stem))
    try:
        if old is None:
            folder.write_job(source, found.parameters, found.sources)
        folder.write_plan(chosen, machines, found.profile)
        folder.publish()
    except RunError:
        if old is None:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    _record_start(folder, source, found, chosen, resumed=old is not None)
    return folder, found.facts.steps


def _record_start(folder: RunFolder, source: capture.JobSource, found: Any, chosen: Plan, *, resumed: bool) -> None:
    with _recording(folder):
        job_name = f"{source.path}:{source.function}"
        events.emit(
            "run_started",
            run=folder.path.name,
            job=job_name,
            ranks=chosen.ranks,
            plan=str(chosen),
            steps=found.facts.steps,
            predicted=msgspec.to_builtins(chosen.predicted),
        )
        events.emit("data_ready", facts=found.data, seconds=found.seconds)
        if resumed and not any(folder.checkpoints.glob("step-*/manifest.json")):
            events.emit("warning", message=f"{folder.path.name} has no checkpoint yet, so it begins again at step 0.")


def open_run(**told: Any) -> Path:
    """`prepare_run` in this process, for a rank that a foreign launcher started."""
    folder, _ = prepare_run(None, **told)
    return folder.path


def _launch(
    starter: Starter, folder: RunFolder, more: dict[str, Any], *, display: bool, steps: int | None
) -> RunResult:
    """Run the folder's plan with the local launcher, show it, and record how it ended."""
    from shardwise.observe.live import Display

    chosen = files.load(folder.path / "plan.json", Plan)
    began = time.perf_counter()
    with ExitStack() as stack:
        shown = stack.enter_context(Display(folder.path, of_steps=steps)) if display else None
        exits = run_ranks(
            starter,
            "shardwise.train.worker:main",
            lambda rank: {"run": str(folder.path.resolve()), **more},
            chosen.ranks,
            logs=folder.logs,
            on_poll=shown.poll if shown else lambda: None,
        )
        failure = exits.failure()
        status = "stopped" if exits.stop_signal else "failed" if failure else "finished"
        with _recording(folder):
            if failure is not None:
                events.emit("run_failed", kind=type(failure).__name__, message=str(failure))
            last = summaries.read(folder.path).step
            events.emit("run_finished", step=last, seconds=time.perf_counter() - began, status=status)
    return _result(folder, status, exits, failure)


def _result(folder: RunFolder, status: str, exits: RankExits, failure: ShardwiseError | None) -> RunResult:
    if failure is not None and not exits.stop_signal:
        raise failure
    code = 128 + exits.stop_signal if exits.stop_signal else 0
    return RunResult(path=folder.path, status=status, summary=summaries.read(folder.path), exit_code=code)


def _run_script(
    starter: Starter,
    script: Path,
    args: Sequence[str],
    plan_text: str | None,
    root: Path,
    display: bool,
    name: str | None,
) -> RunResult:
    """Every rank runs the user's script, which opens a session of its own."""
    machines = discover(starter=starter)
    fixed = parse_plan(plan_text or "")
    chosen = build_plan({"data": max(1, len(machines.devices) // build_plan({**fixed, "data": 1}).ranks), **fixed})
    refuse_unbuilt(chosen)
    refuse_places(chosen, machines)
    folder = RunFolder.create(root, name=name or script.stem)
    source = capture.JobSource(folder=str(script.resolve().parent), path=script.name, function="")
    folder.write_job(source, {"args": list(args)}, {script.name: script.read_text(encoding="utf-8")})
    folder.write_plan(chosen, machines, None)
    folder.publish()
    with _recording(folder):
        events.emit("run_started", run=folder.path.name, job=script.name, ranks=chosen.ranks, plan=str(chosen))
    more = {"script": [str(script.resolve()), *args]}
    return _launch(starter, folder, more, display=display, steps=None)


def _train_here(
    job: Job,
    sets: Sets,
    parameters: dict[str, Any],
    plan: str | None,
    resume: str | None,
    runs: str | Path,
    name: str | None,
    cluster: str | Path | None,
) -> RunResult:
    """This process is a rank already."""
    from shardwise.train import worker

    path = worker.environment(
        {
            "source": _source(job),
            "sets": _sets(sets, parameters),
            "plan_text": plan,
            "resume": resume,
            "root": Path(runs),
            "name": name,
            "cluster": cluster,
        }
    )
    return RunResult(path=path, status="finished", summary=summaries.read(path))


def _cuts(fixed: Mapping[str, Any]) -> bool:
    """Whether the places for cuts must be known."""
    return build_plan(dict(fixed)).pipeline > 1


def _look(
    starter: Starter | None,
    source: capture.JobSource,
    sets: Mapping[str, Any],
    *,
    cuts: bool,
    small: bool = False,
    split: str = "",
) -> Probe:
    """What the probing process finds of a job; in this process when there is no starter."""
    if starter is None:
        return probe(source, sets, cuts=cuts, small=small, split=split)
    with tempfile.TemporaryDirectory(prefix="shardwise-") as scratch:
        out = Path(scratch) / "probe.json"
        told = {"source": msgspec.to_builtins(source), "sets": dict(sets), "out": str(out)}
        told |= {"cuts": cuts, "small": small, "split": split}
        _ended(run_ranks(starter, "shardwise.train.probe:entry", lambda rank: told, 1, logs=Path(scratch)))
        log = (Path(scratch) / "rank-0.log").read_text(errors="replace")
        sys.stdout.write(log)  # what the job file prints
        return files.load(out, Probe)


def _ended(exits: RankExits) -> None:
    """Raises what ended them, if anything did."""
    if exits.stop_signal:
        raise KeyboardInterrupt
    if (failure := exits.failure()) is not None:
        raise failure


def _source(job: Job) -> capture.JobSource:
    if callable(job):
        return cells.source_of(job)
    found = capture.find_job(str(job))
    if found is None:
        raise JobError(
            f"{job} has no job: no function named job and none annotated '-> sw.TrainJob'. "
            "Add one, or run the file as a script with: shardwise train."
        )
    return found


def _sets(sets: Sets, parameters: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(sets) if isinstance(sets, Mapping) else capture.parse_sets(sets)
    return {**given, **parameters}


def _folder(run: str | Path, root: str | Path) -> RunFolder:
    return RunFolder(known_runs.find_run(run, Path(root)))


def _recording(folder: RunFolder) -> Any:
    stack = ExitStack()
    lines = events.JsonLines(folder.events)
    stack.callback(lines.close)
    stack.enter_context(events.sink(lines))
    return stack


def _refuse_nested() -> None:
    context = sys.modules.get("shardwise.train.context")
    if context is not None and context.launched():
        raise ClusterError(
            "sw.train was called in a rank of another run. In a script that starts runs, put the call under "
            "if __name__ == '__main__': so that importing the file does not start one."
        )
