"""Find run folders: by path, by name, by the start of a name, or the latest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from shardwise.errors import RunError, did_you_mean
from shardwise.events import Event
from shardwise.observe.history import decode, finite, number, whole, word

RECORDS = ("events.jsonl", "job.json", "plan.json")  # any of them makes a folder a run
GLANCE_BYTES = 65536


class RunLine(Struct, frozen=True, kw_only=True):
    """One run in a list. `started` is seconds since 1970, `loss` the last training loss that was written."""

    name: str
    path: str
    status: str
    started: float | None
    step: int
    loss: float | None
    ranks: int | None
    plan: str
    job: str


def find_run(which: str | os.PathLike[str] = "latest", root: Path = Path("runs")) -> Path:
    """The folder of a run: a path to it, its name inside `root`, the start of exactly one name there, or `latest`.

    A link (`runs/latest`) is followed once, so that a newer run does not change what was found. Raises RunError with
    the nearest name when there is no such run.
    """
    text = os.fspath(which)
    given = Path(text)
    for place in (given, root / text):
        if place.is_symlink() and is_run(place):
            return place.parent / os.readlink(place)
        if is_run(place):
            return place
    if given.name == "latest":
        return _newest(given.parent if given.parent != Path() else root)
    return _by_start(text, root)


def is_run(folder: Path) -> bool:
    """Whether the folder holds at least one of a run's own files."""
    return any((folder / record).is_file() for record in RECORDS)


def list_runs(root: Path = Path("runs")) -> list[RunLine]:
    """All runs in `root`, the newest first. Reads only the beginning and the end of each events file."""
    lines = [glance(folder) for folder in _folders(root)]
    return sorted(lines, key=lambda line: (line.started or 0.0, line.name), reverse=True)


def glance(run: Path) -> RunLine:
    """What one line of a list says of the run."""
    found = list(_ends(run / "events.jsonl"))
    started = [event for event in found if event["event"] == "run_started"]
    steps = [event for event in found if event["event"] == "step" and whole(event, "step") is not None]
    last = steps[-1] if steps else {}
    first = started[0] if started else {}
    return RunLine(
        name=run.name,
        path=str(run),
        status=status(found),
        started=finite(first or (found[0] if found else {}), "t"),
        step=whole(last, "step") or 0,
        loss=number(last, "loss"),
        ranks=whole(first, "ranks"),
        plan=word(first, "plan"),
        job=word(first, "job"),
    )


def status(found: list[Event]) -> str:
    """`running` until an event says how it ended: the status of `run_finished`, or `failed`; `empty` without events."""
    for event in reversed(found):
        if event["event"] == "run_finished":
            return word(event, "status") or "finished"
        if event["event"] == "run_failed":
            return "failed"
        if event["event"] in ("run_started", "step"):
            return "running"
    return "running" if found else "empty"


def _ends(path: Path) -> Iterator[Event]:
    """The events in the first and the last 64 KiB of the file; lines that the cut broke are skipped."""
    try:
        with open(path, "rb") as file:
            raw = file.read(GLANCE_BYTES)
            size = os.fstat(file.fileno()).st_size
            if size > GLANCE_BYTES:
                raw = raw.rpartition(b"\n")[0]
                file.seek(max(len(raw), size - GLANCE_BYTES))
                raw += b"\n" + file.read().partition(b"\n")[2]
    except OSError:
        return
    for line in raw.split(b"\n"):
        event = decode(line)
        if event is not None:
            yield event


def _folders(root: Path) -> list[Path]:
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if not entry.is_symlink() and is_run(entry)]


def _newest(root: Path) -> Path:
    folders = _folders(root)
    if not folders:
        raise RunError(f"there is no run in {root}{os.sep}. Start one with: shardwise train FILE.")
    return max(folders, key=lambda folder: (_changed(folder), folder.name))


def _changed(folder: Path) -> float:
    return max((folder / record).stat().st_mtime for record in RECORDS if (folder / record).is_file())


def _by_start(text: str, root: Path) -> Path:
    folders = _folders(root)
    near = [folder for folder in folders if text and folder.name.startswith(text)]
    if len(near) == 1:
        return near[0]
    if near:
        names = ", ".join(folder.name for folder in near[:5])
        raise RunError(f"'{text}' is the start of {len(near)} runs in {root}{os.sep}: {names}. Write more of the name.")
    if text and Path(text).is_dir():
        raise RunError(
            f"'{text}' is not a run: it has none of {', '.join(RECORDS)}. Give a folder that `shardwise train` made."
        )
    if not folders:
        raise RunError(f"there is no run '{text}', and none in {root}{os.sep}. Start one with: shardwise train FILE.")
    raise RunError(
        f"there is no run '{text}' in {root}{os.sep}{did_you_mean(Path(text).name, [f.name for f in folders])}"
    )
