"""What to say about a run's events as they come: pure, so that the same events give the same lines."""

from __future__ import annotations

import re
from collections import deque

import msgspec
from msgspec import Struct

from shardwise.events import Event
from shardwise.observe.history import amount, finite, number, whole, word
from shardwise.observe.summary import PARTS, evaluation_of, facts_of, step_parts, warning_text
from shardwise.observe.text import evaluation_text, facts_text, figure, labelled, percent, plural
from shardwise.spec.plan import Prediction
from shardwise.units import format_bytes, format_count, format_seconds

EVERY_S = 5.0  # between two step lines, by the clock of the events
WINDOW_STEPS = 20  # that the rate and the shares are averaged over
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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

    def __init__(self, run: str, of_steps: int | None = None) -> None:
        self.run = run
        self.of_steps = of_steps
        self.facts: dict[str, object] = {}
        self._window: deque[Event] = deque(maxlen=WINDOW_STEPS)
        self._first: tuple[float, int] | None = None  # time and number of the first step since the start or resumption
        self._said_t: float | None = None
        self._ready = 0
        self._ranks: int | None = None

    def hear(self, event: Event) -> list[str]:
        """The lines to print for this event, at once; most steps have none (see `due`)."""
        match event["event"]:
            case "run_started":
                return self._started(event)
            case "data_ready":
                self.facts = facts_of(event)
                return self._data(event)
            case "rank_ready":
                return self._rank_ready(event)
            case "step":
                self._step(event)
                return []
            case "evaluation":
                return labelled([("held out", f"{evaluation_text(evaluation_of(event), self.facts)}{_took(event)}")])
            case "checkpoint_saved":
                size = format_bytes(amount(event, "bytes"))
                return labelled([("saved", f"step {whole(event, 'step')}, {size}{_took(event)}")])
            case "resumed":
                ranks = whole(event, "from_ranks")
                written = f", written by {plural(ranks, 'rank')}" if ranks else ""
                return labelled([("resumed", f"at step {whole(event, 'step')} from {word(event, 'path')}{written}")])
            case "run_finished":
                return labelled(
                    [(word(event, "status") or "finished", f"at step {whole(event, 'step')}{_took(event)}")]
                )
        return labelled([("warning", warning_text(event))])

    def due(self) -> list[str]:
        """The step line, if one is due: the first step, the last, and one every EVERY_S seconds of the run's own clock."""
        if not self._window:
            return []
        event = self._window[-1]
        at = finite(event, "t")
        last = self.of_steps is not None and whole(event, "step") == self.of_steps
        waited = self._said_t is None or at is None or not self._said_t <= at < self._said_t + EVERY_S
        if not (waited or last) or self._said_t == (at or 0.0):
            return []
        self._said_t = at or 0.0
        return [step_line(self.status())]

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
        job = word(event, "job")
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
        return f"{format_seconds(step_s)} a step, {format_bytes(min(predicted.peak_bytes, 1e18))} a rank{total}"

    def _data(self, event: Event) -> list[str]:
        return labelled([("data", f"{facts_text(self.facts) or 'ready'}{_took(event)}")])

    def _rank_ready(self, event: Event) -> list[str]:
        self._ready += 1
        if self._ready != self._ranks:
            return []
        return labelled([("ranks", f"{self._ready} ready{_took(event)}")])

    def _step(self, event: Event) -> None:
        at, step = finite(event, "t"), whole(event, "step")
        if step is None:
            return
        if self._first is None and at is not None:
            self._first = (at, step)
        self._window.append(event)

    def _rate(self) -> str:
        seconds = sum(amount(event, "seconds") for event in self._window)
        if not seconds:
            return ""
        for what in ("tokens", "samples"):
            total = sum(amount(event, what) for event in self._window)
            if total:
                return f"{format_count(total / seconds)} {what}/s"
        return ""

    def _shares(self) -> str:
        totals = dict.fromkeys(PARTS, 0.0)
        for event in self._window:
            for part, seconds in step_parts(event).items():
                totals[part] += seconds
        seconds = sum(totals.values())
        if not seconds:
            return ""
        return " ".join(f"{part} {percent(totals[part] / seconds)}" for part in ("compute", "communicate", "wait"))

    def _left(self, event: Event) -> str:
        """Steps to go times the wall seconds a step so far, evaluations and checkpoints among them."""
        at, step = finite(event, "t"), whole(event, "step")
        if self.of_steps is None or step is None or self._first is None or at is None:
            return ""
        first_t, first_step = self._first
        each_s = (at - first_t) / (step - first_step) if step > first_step else amount(event, "seconds")
        return format_seconds(round(max(0.0, each_s * (self.of_steps - step)))) if step < self.of_steps else ""


def step_line(status: Status) -> str:
    """`step 120/400   loss 3.412   14.1 k tokens/s   compute 81 % communicate 9 % wait 0 %   2 min 13 s left`."""
    done = (
        str(status.step) if status.of_steps is None else f"{status.step:>{len(str(status.of_steps))}}/{status.of_steps}"
    )
    words = (f"loss {figure(status.loss)}", status.rate, status.shares, f"{status.left} left" if status.left else "")
    return labelled([("step", "   ".join(filter(None, (done, *words))))])[0]


def printable(line: bytes) -> str:
    """A line of a rank's log without control characters; of a line that overwrote itself (tqdm), the last state."""
    text = line.decode("utf-8", "replace").rstrip("\r")
    return CONTROL.sub("", text.rpartition("\r")[2]).rstrip()


def _took(event: Event) -> str:
    seconds = amount(event, "seconds")
    return f"   {format_seconds(seconds)}" if seconds else ""
