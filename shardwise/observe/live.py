"""A run while it goes on: a bar on a terminal, plain lines elsewhere, both read from the run's own files."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from shardwise.events import Event
from shardwise.observe.history import decode, since_start
from shardwise.observe.narrate import Narrator, Status, log_line
from shardwise.observe.summary import job_record, parameters_of
from shardwise.observe.text import figure

REFRESH_S = 0.1
SHARES_FROM_COLUMNS = 130  # what fits beside everything else


class Follow:
    """The whole lines added to a growing file since the last call. The file may not be there yet."""

    def __init__(self, path: str | os.PathLike[str], *, skip_existing: bool = False) -> None:
        self.path = Path(path)
        self._offset = self._size() if skip_existing else 0
        self._rest = b""

    def lines(self) -> list[bytes]:
        """New lines without their ends; a last line without an end waits for the rest of it."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                raw = file.read()
        except OSError:
            return []
        self._offset += len(raw)
        *ended, self._rest = (self._rest + raw).split(b"\n")
        return ended

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0


class Tail:
    """The events added to a run's `events.jsonl` since the last poll."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._follow = Follow(path)

    def poll(self) -> list[Event]:
        """New events, oldest first; lines that are no event are dropped."""
        return [event for line in self._follow.lines() if (event := decode(line)) is not None]


class Display:
    """Shows one run. Call `poll` as often as you like, `close` once (or use it in a `with` block); it starts no thread.

    `run` is the run folder, `of_steps` the job's number of steps. It begins with the last `run_started` that is there
    at the first poll, and with what rank 0 prints from now on. `out` is a terminal, or any text stream, which then
    gets plain lines without control characters that depend on nothing but the events and the log.
    """

    def __init__(self, run: Path, *, of_steps: int | None = None, out: IO[str] | None = None) -> None:
        self.out: IO[str] = sys.stdout if out is None else out
        self.narrator = Narrator(str(run), of_steps, parameters_of(job_record(run)))
        self.tail = Tail(run / "events.jsonl")
        self.log = Follow(run / "logs" / "rank-0.log", skip_existing=True)
        self._begun = False
        self.bar = Bar(self.out) if self.out.isatty() else None

    def poll(self) -> None:
        """Read what is new and show it."""
        for line in self.log.lines():
            self._print(log_line(line))
        events = self.tail.poll()
        if not self._begun:
            events = list(since_start(events))
            self._begun = bool(events)
        for event in events:
            lines = self.narrator.hear(event)
            for text in lines if self.bar is None or event["event"] != "step" else ():
                self._print(text)
        if self.bar is None:
            self.out.flush()
        else:
            self.bar.update(self.narrator.status())

    def close(self) -> None:
        """Show what is left and give the terminal back. Closing twice is the same as once."""
        self.poll()
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _print(self, text: str) -> None:
        if self.bar is None:
            encoding = getattr(self.out, "encoding", None) or "utf-8"
            self.out.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        else:
            self.bar.print(text)


class Bar:
    """A progress bar at the bottom of a terminal, with lines above it. Drawn only from `update`: no thread."""

    def __init__(self, out: IO[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(file=out, highlight=False)
        self._progress = Progress(
            TextColumn("[bold]step"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("step", total=None, said="", visible=False)
        self._started = False
        self._drawn = 0.0

    def print(self, text: str) -> None:
        """One line above the bar, as it is."""
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, status: Status) -> None:
        """Draw the status, at most every REFRESH_S seconds; nothing before the first step."""
        now = time.monotonic()
        if not status.step or (now - self._drawn < REFRESH_S and status.step != status.of_steps):
            return
        if not self._started:
            self._progress.start()
            self._started = True
        self._drawn = now
        shares = status.shares if self._console.width >= SHARES_FROM_COLUMNS else ""
        left = f"{status.left} left" if status.left else ""
        said = "  ".join(filter(None, (f"loss {figure(status.loss)}", status.rate, left, shares)))
        self._progress.update(
            self._task, total=status.of_steps, completed=status.step, said=said, visible=True, refresh=True
        )

    def close(self) -> None:
        self._progress.stop()
