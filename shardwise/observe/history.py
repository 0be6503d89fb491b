"""The lines of a run's `events.jsonl` as facts: which steps count, and numbers read without trust in the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from shardwise import events
from shardwise.errors import RunError
from shardwise.events import Event

LARGEST = 1e18
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours and cursor movements of terminals


def read(run: Path) -> list[Event]:
    """Every whole event of the run, oldest first. Raises RunError when the file is there but cannot be read."""
    try:
        found = events.read(run / "events.jsonl")
    except OSError as error:
        raise RunError(
            f"cannot read {run / 'events.jsonl'}: {error.strerror}. Check who owns the run folder."
        ) from None
    return [event for event in found if is_event(event)]


def decode(line: bytes) -> Event | None:
    """One line as an event; None for a line that is cut short, empty or something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if is_event(value) else None


def is_event(value: object) -> bool:
    """Whether a decoded line has the shape of an event: a mapping with a name."""
    return isinstance(value, dict) and isinstance(value.get("event"), str)


def named(found: Iterable[Event], name: str) -> list[Event]:
    """The events called `name`, in order."""
    return [event for event in found if event["event"] == name]


def committed(found: Sequence[Event], name: str = "step") -> list[Event]:
    """The events called `name` that stand: what a `resumed` event took back, or a later one repeated, is left out.

    A run that dies in step 450 and resumes from the checkpoint of step 400 has steps 401 to 450 twice in its file;
    the second of each counts. Sorted by step; events without a step are dropped.
    """
    kept: dict[int, Event] = {}
    for event in found:
        step = whole(event, "step")
        if step is None:
            continue
        if event["event"] == "resumed":
            kept = {at: old for at, old in kept.items() if at <= step}
        elif event["event"] == name:
            kept[step] = event
    return [kept[step] for step in sorted(kept)]


def since_start(found: Sequence[Event]) -> Sequence[Event]:
    """The events from the last `run_started` on: a resumed run's file also holds what was before it."""
    starts = [index for index, event in enumerate(found) if event["event"] == "run_started"]
    return found[starts[-1] :] if starts else found


def number(event: Event, key: str) -> float | None:
    """The field as a float (NaN and infinity included), or None when it is missing or is no number."""
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(event: Event, key: str) -> float | None:
    """The field as a float of a size that a run can have (sums of it stay finite), else None."""
    value = number(event, key)
    return value if value is not None and abs(value) <= LARGEST else None


def amount(event: Event, key: str) -> float:
    """The field as a finite float of at least 0; anything else counts as 0."""
    return max(0.0, finite(event, key) or 0.0)


def whole(event: Event, key: str) -> int | None:
    """The field as an int of at least 0, or None."""
    value = finite(event, key)
    return int(value) if value is not None and value >= 0 else None


def word(event: Event, key: str) -> str:
    """The field as printable text on one line; empty when it is missing."""
    value = event.get(key)
    return "" if value is None else printable(str(value))


def printable(text: str) -> str:
    """The text on one line, without terminal escapes and other characters that do not print."""
    return " ".join("".join(c if c.isprintable() else " " for c in ESCAPE.sub("", text)).split())


def learning_rate(event: Event) -> float | None:
    """The step's learning rate; of several optimizers, the first one's."""
    value = event.get("lr")
    if isinstance(value, list) and value:
        value = value[0]
    return number({"lr": value}, "lr")
