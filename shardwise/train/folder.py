"""The run folder is the record: `runs/<id>/` holds the job, the plan, the events, the checkpoints and the report."""

from __future__ import annotations

import difflib
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from shardwise.errors import RunError
from shardwise.spec import files
from shardwise.spec.cluster import Cluster
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile
from shardwise.train.capture import JobSource, digest

PACKAGES = ("shardwise", "torch", "numpy", "msgspec", "tokenizers", "safetensors")


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`job.json`: which function with which parameters, the hash of its source, and the versions it ran with."""

    source: JobSource
    original: str
    parameters: dict[str, Any]
    hash: str
    versions: dict[str, str]
    created: float


class RunFolder:
    """One run on disk. `create` opens a new one, `RunFolder(path)` an old one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = path / "code"
        self.logs = path / "logs"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, root: Path, *, name: str) -> RunFolder:
        """A new, private, empty run folder. Raises RunError if it cannot be made."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        try:
            root.mkdir(parents=True, exist_ok=True)
            for attempt in range(100):
                path = root / (f"{stamp}-{name}" + (f"-{attempt + 1}" if attempt else ""))
                try:
                    path.mkdir(mode=0o700)
                except FileExistsError:
                    continue
                break
            else:
                raise RunError(f"100 runs of this second exist in {root}. Try again.")
            run = cls(path)
            for folder in (run.code, run.logs, run.checkpoints):
                folder.mkdir()
        except OSError as error:
            raise RunError(
                f"cannot write the run folder in {root}: {error.strerror}. "
                "Free some space, or choose another folder with --runs DIR."
            ) from None
        return run

    def publish(self) -> None:
        """Let `latest` point to this run, once it is written."""
        with self.guarded():
            _point(self.path.parent / "latest", self.path.name)

    def write_job(self, source: JobSource, parameters: Mapping[str, Any], sources: Mapping[str, str]) -> None:
        """Keep the job: its sources under `code/`, everything else in `job.json`."""
        kept = msgspec.structs.replace(source, folder="code")
        record = JobRecord(
            source=kept,
            original=str(Path(source.folder) / source.path),
            parameters=dict(parameters),
            hash=digest(sources),
            versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            created=time.time(),
        )
        with self.guarded():
            for name, text in sources.items():
                file = self.code / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            files.save(record, self.path / "job.json")

    def write_plan(self, plan: Plan, cluster: Cluster, profile: ModelProfile | None) -> None:
        with self.guarded():
            files.save(plan, self.path / "plan.json")
            files.save(cluster, self.path / "cluster.json")
            if profile is not None:
                files.save(profile, self.path / "profile.json")

    def record(self) -> JobRecord:
        """`job.json` of this run. Raises RunError when there is none."""
        if not (self.path / "job.json").is_file():
            raise RunError(f"{self.path} is not a run folder: it has no job.json. List the runs with: shardwise runs.")
        return files.load(self.path / "job.json", JobRecord)

    def source(self) -> JobSource:
        """The kept copy of the job."""
        return msgspec.structs.replace(self.record().source, folder=str(self.code.resolve()))

    def refuse_changed_job(self, sources: Mapping[str, str], parameters: Mapping[str, Any]) -> None:
        """Raise RunError with a diff when the job differs from the one that this run was started with."""
        record = self.record()
        lines: list[str] = []
        for name in sorted({*sources, *self._kept()}):
            old = self._kept().get(name, "").splitlines()
            lines += difflib.unified_diff(
                old, sources.get(name, "").splitlines(), f"run/{name}", f"now/{name}", "", "", 1, ""
            )
        before, after = _shown(record.parameters), _shown(parameters)
        lines += difflib.unified_diff(before, after, "run/parameters", "now/parameters", "", "", 0, "")
        if lines:
            raise RunError(
                f"the job has changed since {self.path.name} was started, so it cannot go on as the same run:\n"
                + "\n".join(lines)
                + "\nUndo the change, or start a new run without --resume."
            )

    def _kept(self) -> dict[str, str]:
        return {str(p.relative_to(self.code)): p.read_text("utf-8") for p in self.code.rglob("*.py") if p.is_file()}

    def guarded(self) -> _Guard:
        """Turn an OSError while writing into a RunError that says what to do."""
        return _Guard(self.path)


class _Guard:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise RunError(f"cannot write to {self.path}: {error.strerror}. Free some space and try again.") from None


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".latest-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _version(name: str) -> str:
    module = sys.modules.get(name)
    found = getattr(module, "__version__", None)
    if isinstance(found, str):
        return found
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _shown(parameters: Mapping[str, Any]) -> list[str]:
    plain = msgspec.json.decode(msgspec.json.encode(dict(parameters), enc_hook=str))
    return [f"{name} = {plain[name]!r}" for name in sorted(plain)]
