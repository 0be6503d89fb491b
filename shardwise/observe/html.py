"""Small HTML views of a Plan and a Summary for notebooks, and the tables that the report is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from shardwise.events import Event
from shardwise.observe.exchanged import axes_text, exposed_text
from shardwise.observe.history import amount, committed, finite, number, whole
from shardwise.observe.summary import PARTS, Compared, Summary, step_parts, tokens
from shardwise.observe.svg import Series, line_plot, smooth, split_bar, stacked_plot
from shardwise.observe.text import (
    PART_NAMES,
    facts_text,
    held_out_text,
    loss_text,
    parameters_text,
    percent,
    rate_text,
    ratio,
    state_text,
)
from shardwise.spec.plan import AXES, Plan
from shardwise.units import format_bytes, format_seconds

Row = tuple[str, ...]


def plan_html(plan: Plan) -> str:
    """A table of the plan's mesh and choices, and a bar of where its predicted step goes."""
    mesh = " x ".join(f"{axis} {getattr(plan, axis)}" for axis in AXES if getattr(plan, axis) > 1) or "one rank"
    rows: list[Row] = [("plan", str(plan)), ("mesh", mesh), ("ranks", str(plan.ranks)), ("precision", plan.precision)]
    drawn = ""
    if plan.predicted:
        predicted = plan.predicted
        rows.append(("predicted step", format_seconds(predicted.step_s)))
        rows.append(("predicted peak memory", format_bytes(predicted.peak_bytes)))
        rows += [("limited by", predicted.limit)] if predicted.limit else []
        labels = {name: format_seconds(seconds) for name, seconds in predicted.parts_s.items()}
        drawn = split_bar("predicted step", predicted.parts_s, labels) if predicted.parts_s else ""
    return f"<div>{table(rows)}{drawn}</div>"


def summary_html(summary: Summary) -> str:
    """The run's main figures, predicted beside measured, and a bar of where a step's time went."""
    return f"<div>{table(summary_rows(summary))}{compared_table(summary.compared)}{time_bar(summary)}</div>"


def summary_rows(summary: Summary) -> list[Row]:
    """Label and text of what the summary holds, without what it does not."""
    memory = ", ".join(f"rank {rank} {format_bytes(peak)}" for rank, peak in summary.peak_bytes.items())
    rows = [
        ("run", f"{summary.run}: {state_text(summary)}"),
        ("job", summary.job),
        ("parameters", parameters_text(summary.parameters)),
        ("plan", summary.plan),
        ("mesh", axes_text(summary.axes)),
        ("data", facts_text(summary.facts)),
        ("loss", loss_text(summary)),
        ("held out", held_out_text(summary)),
        ("rate", rate_text(summary)),
        ("exposed", exposed_text(summary.exposed) if summary.exposed else ""),
        ("peak memory", memory),
        *(("resumed", text) for text in summary.resumed),
        ("failed", summary.failure),
    ]
    return [row for row in rows if row[1]]


def time_bar(summary: Summary) -> str:
    """Where the time of the steps went, as one bar; empty when no step was timed."""
    if not summary.time:
        return ""
    named = {PART_NAMES.get(part, part): share for part, share in summary.time.items()}
    return split_bar("where a step's time went", named, {name: percent(share) for name, share in named.items()})


def compared_table(compared: Sequence[Compared]) -> str:
    """Predicted beside measured; empty when nothing was predicted."""
    rows: list[Row] = []
    for row in compared:
        shown = format_seconds if row.unit == "s" else format_bytes
        rows.append((row.name, shown(row.predicted), shown(row.measured), ratio(row)))
    return table(rows, head=("", "predicted", "measured", "ratio")) if rows else ""


def exchanged_table(summary: Summary) -> str:
    """What the ranks exchanged by axis and operation; empty when it was not recorded."""
    rows: list[Row] = [
        (
            one.axis,
            one.backend,
            one.operation,
            str(one.messages),
            format_bytes(one.num_bytes),
            format_bytes(one.sent_bytes),
        )
        for one in summary.exchanged
    ]
    rows += [(axis, "", "all, counted", "", "", format_bytes(sent)) for axis, sent in summary.counted_bytes.items()]
    head = ("axis", "backend", "operation", "calls", "bytes handed over", "sent (estimate)")
    return table(rows, head=head)


def table(rows: Sequence[Row], head: Row = ()) -> str:
    """Rows of text as an HTML table, everything escaped; the first cell of each row is its heading."""
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(row[0])}</th>"
        + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table>{top}{body}</table>"


def loss_plot(found: Sequence[Event]) -> str:
    """Training loss (faint: each step; strong: its running mean) and held-out loss over steps."""
    raw = _points(committed(found), "loss")
    held_out = tuple(_points(committed(found, "evaluation"), "loss"))
    series = [
        Series(name="", points=tuple(raw), faint=True),
        Series(name="training", points=tuple(smooth(raw))),
        Series(name="held out", points=held_out, colour=1, dots=True),
    ]
    return line_plot("loss", series, x_label="step")


def rate_plot(found: Sequence[Event], *, text: bool) -> str:
    """Tokens a second over steps, or samples where there are no tokens (`text`: see `summary.tokens`)."""
    steps = [step for step in committed(found) if amount(step, "seconds") > 0]
    counts = [tokens(step, text=text) for step in steps]
    what = "tokens" if any(counts) else "samples"
    counts = counts if any(counts) else [amount(step, "samples") for step in steps]
    at = [float(whole(step, "step") or 0) for step in steps]
    raw = [(x, count / amount(step, "seconds")) for x, count, step in zip(at, counts, steps, strict=True)]
    series = [
        Series(name="", points=tuple(raw), colour=3, faint=True),
        Series(name="", points=tuple(smooth(raw)), colour=3),
    ]
    return line_plot(f"{what} a second", series, x_label="step", zero=True)


def parts_plot(found: Sequence[Event]) -> str:
    """Shares of each step's time, stacked, over steps."""
    steps = committed(found)
    split = [step_parts(step) for step in steps]
    layers = {PART_NAMES.get(part, part): [parts[part] for parts in split] for part in PARTS}
    xs = [float(whole(step, "step") or 0) for step in steps]
    return stacked_plot("share of step time", xs, layers, x_label="step")


def run_bar(summary: Summary) -> str:
    """Where the wall time of the whole run went, as one bar."""
    spent = {name: seconds for name, seconds in summary.run_seconds.items() if seconds}
    return split_bar("where the run's time went", spent, {name: format_seconds(s) for name, s in spent.items()})


def _points(found: Sequence[Event], key: str) -> list[tuple[float, float]]:
    """(step, value); a value that no plot can hold is a gap."""
    recorded = [event for event in found if number(event, key) is not None]
    return [(float(whole(event, "step") or 0), _drawable(event, key)) for event in recorded]


def _drawable(event: Event, key: str) -> float:
    value = finite(event, key)
    return math.nan if value is None else value
