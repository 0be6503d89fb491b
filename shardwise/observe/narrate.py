"""What to say about a run's events as they come: pure, so that the same events give the same lines."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from shardwise.events import Event
from shardwise.observe.exchanged import axes_of, axes_text
from shardwise.observe.history import ESCAPE, amount, finite, number, whole, word
from shardwise.observe.summary import PARTS, evaluation_of, facts_of, inside_run, step_parts, tokens, warning_text
from shardwise.observe.text import evaluation_words, facts_text, figure, labelled, parameters_text, percent, plural
from shardwise.plan.splits import splits_text
from shardwise.spec.plan import Prediction
from shardwise.units import format_bytes, format_count, format_seconds

EVERY_S = 5.0  # between two step lines, by the clock of the events
WINDOW_STEPS = 20  # that the rate and the shares are averaged over


class Status(Struct, frozen=True, kw_only=True):
    """Where a run stands: finished steps, the last loss, and the recent rate, shares of time and time left as text."""

    step: int
    of_steps: int | None
    loss: float | None
    rate: str
    shares: str
    left: str


class Narrator:
    """Turns events into lines and a Status. `of_steps` is how many steps the job asks for, if known."""

    def __init__(self, run: str, of_steps: int | None = None, parameters: Mapping[str, Any] | None = None) -> None:
        self.run = run
        self.of_steps = of_steps
        self.parameters = parameters or {}
        self.facts: dict[str, object] = {}
        self._window: deque[Event] = deque(maxlen=WINDOW_STEPS)
        self._first: tuple[float, int] | None = None  # time and number of the first step since the start or resumption
        self._said_t: float | None = None
        self._ready = 0
        self._ranks: int | None = None

    def hear(self, event: Event) -> list[str]:
        """The lines to print for this event; of steps: the first, the last, one every EVERY_S of their own clock."""
        match event["event"]:
            case "run_started":
                return self._started(event)
            case "training":
                self.of_steps = whole(event, "steps") or self.of_steps
                return []
            case "data_ready":
                self.facts = facts_of(event)
                return self._data(event)
            case "rank_ready":
                return self._rank_ready(event)
            case "step":
                return self._step(event)
            case "evaluation":
                words = evaluation_words(evaluation_of(event), {})
                return labelled([("held out", "   ".join((self._of(event), *words)) + _took(event))])
            case "checkpoint_saved":
                size = format_bytes(amount(event, "bytes"))
                return labelled([("saved", f"{self._of(event)}   {size}{_took(event)}")])
            case "resumed":
                ranks = whole(event, "from_ranks")
                path = inside_run(Path(self.run), word(event, "path"))
                written = f", written by {plural(ranks, 'rank')}" if ranks else ""
                return labelled([("resumed", f"at step {whole(event, 'step')} from {path}{written}")])
            case "run_finished":
                return labelled(
                    [(word(event, "status") or "finished", f"at step {whole(event, 'step')}{_took(event)}")]
                )
        said = splits_text(_words(event, "splits"), _words(event, "whole")) if event["event"] == "splits" else []
        splits = [("" if number else "splits", one) for number, one in enumerate(said)]
        return labelled([("mesh", axes_text(axes_of([event]))), ("warning", warning_text(event)), *splits])

    def status(self) -> Status:
        """Where the run stands after the last step event."""
        event = self._window[-1] if self._window else {}
        return Status(
            step=whole(event, "step") or 0,
            of_steps=self.of_steps,
            loss=number(event, "loss"),
            rate=self._rate(),
            shares=self._shares(),
            left=self._left(event),
        )

    def _started(self, event: Event) -> list[str]:
        self.of_steps = whole(event, "steps") or self.of_steps
        self._ranks, self._ready, self._first, self._said_t = whole(event, "ranks"), 0, None, None
        self._window.clear()
        ranks = f"on {plural(self._ranks, 'rank')}" if self._ranks else ""
        plan = "   ".join(filter(None, (word(event, "plan"), ranks)))
        job = "   ".join(filter(None, (word(event, "job"), parameters_text(self.parameters))))
        return labelled([("run", self.run), ("job", job), ("plan", plan), ("predicted", self._predicted(event))])

    def _predicted(self, event: Event) -> str:
        try:
            predicted = msgspec.convert(event.get("predicted"), Prediction)
        except msgspec.ValidationError:
            return ""
        step_s = finite({"step_s": predicted.step_s}, "step_s")
        if step_s is None:
            return ""
        total = f", {self.of_steps} steps in {format_seconds(step_s * self.of_steps)}" if self.of_steps else ""
        exposed_s = finite(predicted.parts_s, "communication")
        of_it = f" ({format_seconds(exposed_s)} of it exposed communication)" if exposed_s else ""
        return f"{format_seconds(step_s)} a step{of_it}, {format_bytes(min(predicted.peak_bytes, 1e18))} a rank{total}"

    def _data(self, event: Event) -> list[str]:
        return labelled([("data", f"{facts_text(self.facts) or 'ready'}{_took(event)}")])

    def _rank_ready(self, event: Event) -> list[str]:
        self._ready += 1
        if self._ready != self._ranks:
            return []
        return labelled([("ranks", f"{self._ready} ready{_took(event)}")])

    def _step(self, event: Event) -> list[str]:
        step = whole(event, "step")
        if step is None:
            return []
        at = finite(event, "t") or 0.0
        self._first = self._first or (at, step)
        self._window.append(event)
        fresh = self._said_t is not None and self._said_t <= at < self._said_t + EVERY_S
        if fresh and step != self.of_steps:
            return []
        self._said_t = at
        return [step_line(self.status())]

    def _rate(self) -> str:
        seconds = sum(amount(event, "seconds") for event in self._window)
        if not seconds:
            return ""
        text = "tokens" in self.facts
        counts = {
            "tokens": sum(tokens(event, text=text) for event in self._window),
            "samples": sum(amount(event, "samples") for event in self._window),
        }
        return next((f"{format_count(count / seconds)} {what}/s" for what, count in counts.items() if count), "")

    def _shares(self) -> str:
        totals = dict.fromkeys(PARTS, 0.0)
        for event in self._window:
            for part, seconds in step_parts(event).items():
                totals[part] += seconds
        seconds = sum(totals.values())
        if not seconds:
            return ""
        words = {part: f"{part} {percent(totals[part] / seconds)}" for part in ("compute", "communicate", "wait")}
        if totals["communicate"]:
            words["communicate"] += f" ({format_seconds(totals['communicate'] / len(self._window))} a step)"
        return " ".join(words.values())

    def _left(self, event: Event) -> str:
        """Steps to go times the wall seconds a step so far, evaluations and checkpoints among them."""
        at, step = finite(event, "t"), whole(event, "step")
        if self.of_steps is None or step is None or self._first is None or at is None:
            return ""
        first_t, first_step = self._first
        each_s = (at - first_t) / (step - first_step) if step > first_step else amount(event, "seconds")
        left_s = round(max(0.0, each_s * (self.of_steps - step)))
        return "" if step >= self.of_steps else f"{left_s} s" if left_s < 60 else format_seconds(left_s)

    def _of(self, event: Event) -> str:
        return progress_text(whole(event, "step") or 0, self.of_steps)


def step_line(status: Status) -> str:
    """`step 120/400   loss 3.412   9 k tokens/s   compute 81 % communicate 9 % (9.7 ms a step) wait 0 %`."""
    done = (
        str(status.step) if status.of_steps is None else f"{status.step:>{len(str(status.of_steps))}}/{status.of_steps}"
    )
    words = (f"loss {figure(status.loss)}", status.rate, status.shares, f"{status.left} left" if status.left else "")
    return labelled([("step", "   ".join(filter(None, (done, *words))))])[0]


def progress_text(step: int, of_steps: int | None) -> str:
    """` 42/400`."""
    return str(step) if of_steps is None else f"{step:>{len(str(of_steps))}}/{of_steps}"


def log_line(line: bytes) -> str:
    """A line of a rank's log as printable text; of a line that overwrote itself (tqdm), the last state."""
    text = ESCAPE.sub("", line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2])
    return "".join(c for c in text.expandtabs() if c.isprintable()).rstrip()


def _took(event: Event) -> str:
    seconds = amount(event, "seconds")
    return f"   {format_seconds(seconds)}" if seconds else ""


def _words(event: Event, name: str) -> dict[str, str]:
    found = event.get(name)
    return {str(k): ESCAPE.sub("", str(v)) for k, v in found.items()} if isinstance(found, dict) else {}
