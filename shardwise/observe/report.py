"""`report.html`: one file with the run's figures and plots. It loads nothing, runs nothing and needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from shardwise.errors import RunError
from shardwise.events import Event
from shardwise.observe import history
from shardwise.observe.html import (
    Row,
    compared_table,
    exchanged_table,
    loss_plot,
    parts_plot,
    rate_plot,
    run_bar,
    summary_rows,
    table,
)
from shardwise.observe.summary import Summary, evaluation_of, job_record, read
from shardwise.observe.text import figure, state_text
from shardwise.observe.timeline import timelines, typical
from shardwise.observe.timeline_plot import timeline_plot
from shardwise.spec.files import write_whole
from shardwise.units import format_bytes, format_seconds

MOST_OTHERS = 2
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --line: #d0d7de; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --line: #30363d; --card: #161b22; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.plots > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
table { border-collapse: collapse; } th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; } th { font-weight: 600; white-space: nowrap; }
.warning { border-left: 4px solid #f59e0b; padding-left: .75rem; }
.wide svg { max-width: 60rem !important; }
.failed { white-space: pre-line; border-left: 4px solid #ef4444; padding-left: .75rem; }
"""


def write_report(run: Path, *, now: float | None = None) -> Path:
    """Write `report.html` into the run folder, whole or not at all, and return its path.

    Raises RunError when the events cannot be read or the file cannot be written.
    """
    page = report_html(read(run, now=now), history.read(run), job_record(run))
    path = run / "report.html"
    try:
        write_whole(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}. Make the run folder writable, or free some space on its disk."
        ) from None
    return path


def report_html(summary: Summary, found: Sequence[Event], job: Mapping[str, Any]) -> str:
    """The page as text: pure, everything of the user's escaped, and a policy that forbids loading anything."""
    plots = "".join(
        f"<div>{plot}</div>"
        for plot in (
            loss_plot(found),
            rate_plot(found, text="tokens" in summary.facts),
            parts_plot(found),
            run_bar(summary),
        )
    )
    sections = [
        f"<h1>{escape(summary.run)}</h1><p>{escape(state_text(summary))}</p>",
        *_notices(summary),
        f"<div class='plots'>{plots}</div>",
        _section("Timeline", _timeline(found)),
        _section("Summary", table(summary_rows(summary)[1:])),
        _section("Predicted and measured", compared_table(summary.compared)),
        _section("Exchanged, over all ranks", exchanged_table(summary)),
        _section("Evaluations", _evaluations(found)),
        _section("Checkpoints", _checkpoints(summary)),
        _section("Job", _job(job)),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(summary.run)} - Shardwise</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _notices(summary: Summary) -> list[str]:
    failed = [f"<p class='failed'>{escape(summary.failure)}</p>"] if summary.failure else []
    return failed + [f"<p class='warning'>{escape(text)}</p>" for text in summary.warnings[:50]]


def _timeline(found: Sequence[Event]) -> str:
    """The recorded step of median length, and some of the others to be unfolded."""
    steps = timelines(found)
    shown = typical(steps)
    if shown is None:
        return ""
    others = "".join(
        f"<div>{timeline_plot(step)}</div>" for step in [one for one in steps if one is not shown][-MOST_OTHERS:]
    )
    folded = f"<details><summary>other recorded steps</summary>{others}</details>" if others else ""
    return f"<div class='wide'>{timeline_plot(shown)}{folded}</div>"


def _evaluations(found: Sequence[Event]) -> str:
    done = [evaluation_of(event) for event in history.committed(found, "evaluation")]
    if not done:
        return ""
    names = list(dict.fromkeys(name for one in done for name in one.metrics))
    rows: list[Row] = [
        (
            str(one.step),
            figure(one.loss),
            "-" if one.perplexity is None else f"{one.perplexity:.2f}",
            *(f"{one.metrics[name]:.4g}" if name in one.metrics else "-" for name in names),
        )
        for one in done
    ]
    return table(rows, head=("step", "loss", "perplexity", *names))


def _checkpoints(summary: Summary) -> str:
    rows: list[Row] = [
        (str(one.step), one.path, format_bytes(one.num_bytes), format_seconds(one.seconds))
        for one in summary.checkpoints
    ]
    return table(rows, head=("step", "path", "size", "written in"))


def _job(job: Mapping[str, Any]) -> str:
    rows: list[Row] = []
    for key, value in job.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}={one}" for name, one in value.items())
        rows.append((str(key), str(value)))
    return table(rows)
