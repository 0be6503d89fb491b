"""A Summary as plain lines for a terminal, a log file or a README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.observe.exchanged import axes_text, exchanged_lines, exposed_text
from shardwise.observe.history import finite, printable, whole
from shardwise.observe.summary import Compared, Evaluation, Summary
from shardwise.observe.timeline import NAMES
from shardwise.units import format_bytes, format_count, format_seconds

LABEL_WIDTH = 12
PART_NAMES = {"wait": "wait for data"}
MOST_RANKS = 8
SHOWN_FACTS = ("tokens", "documents", "samples", "classes")


def summary_text(summary: Summary, *, blocks: bool = False) -> str:
    """The whole summary, one line a topic; topics that the run did not record are left out.

    With `blocks` the loss is also drawn, in Unicode block characters; all else is ASCII.
    """
    return "\n".join([*header_lines(summary), "", *outcome_lines(summary, blocks=blocks)])


def header_lines(summary: Summary) -> list[str]:
    """What was run: run, job, plan, mesh, data."""
    ranks = f"on {plural(summary.ranks, 'rank')}" if summary.ranks else ""
    return labelled(
        [
            ("run", f"{summary.run}   {state_text(summary)}"),
            ("job", "   ".join(filter(None, (summary.job, parameters_text(summary.parameters))))),
            ("plan", "   ".join(filter(None, (summary.plan, ranks)))),
            ("mesh", axes_text(summary.axes)),
            ("data", facts_text(summary.facts)),
            *(("resumed", text) for text in summary.resumed),
        ]
    )


def outcome_lines(summary: Summary, *, blocks: bool = False) -> list[str]:
    """What came of it: loss, held out, rate, time, communication, memory, checkpoints, warnings, predictions."""
    memory = ", ".join(f"rank {rank} {format_bytes(peak)}" for rank, peak in list(summary.peak_bytes.items())[:8])
    lines = labelled(
        [
            ("loss", "   ".join(filter(None, (loss_text(summary), sparkline(summary.loss.curve) if blocks else "")))),
            ("held out", held_out_text(summary)),
            ("rate", rate_text(summary)),
            ("time", shares_text(summary.time)),
            *(("timeline", text) for text in timeline_lines(summary)),
            ("exposed", exposed_text(summary.exposed) if summary.exposed else ""),
            *(("exchanged", text) for text in exchanged_lines(summary.exchanged, summary.counted_bytes)),
            ("memory", f"peak of {memory}" if memory else ""),
            ("checkpoint", checkpoint_text(summary)),
            (
                "skipped",
                f"{plural(summary.skipped, 'step')} with a loss or gradient that was not finite"
                if summary.skipped
                else "",
            ),
            *(("warning", text) for text in summary.warnings),
            ("failed", summary.failure.replace("\n", "\n" + " " * LABEL_WIDTH)),
        ]
    )
    return [*lines, *([""] if summary.compared else []), *compared_lines(summary.compared)]


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """`lr=0.001 layers=6`, as `--set` takes them."""
    return " ".join(f"{name}={printable(str(value)) or repr('')}" for name, value in parameters.items())


def state_text(summary: Summary) -> str:
    """`finished, 400 steps in 2 min 13 s`."""
    steps = f"{summary.step} of {summary.of_steps} steps" if unfinished(summary) else plural(summary.step, "step")
    spent = f" in {format_seconds(summary.seconds)}" if summary.seconds else ""
    silent = summary.silent_s if summary.silent_s is not None and summary.silent_s >= 60 else None
    quiet = f", silent for {format_seconds(silent)}" if silent else ""
    return f"{summary.status}, {steps}{spent}{quiet}"


def unfinished(summary: Summary) -> bool:
    """Whether fewer steps were done than the job asked for."""
    return summary.of_steps is not None and summary.step < summary.of_steps


def loss_text(summary: Summary) -> str:
    loss = summary.loss
    if loss.first is None and loss.last is None:
        return ""
    best = (
        ""
        if loss.best is None or loss.best_step == summary.step
        else f", best {figure(loss.best)} at step {loss.best_step}"
    )
    return f"{figure(loss.first)} at first, {figure(loss.last)} at step {summary.step}{best}"


def sparkline(curve: Sequence[float]) -> str:
    """One block character a value, low to high; fewer than three values are not worth a picture."""
    if len(curve) < 3:
        return ""
    low, high = min(curve), max(curve)
    return "".join(chr(0x2581 + round(7 * (value - low) / (high - low) if high > low else 0)) for value in curve)


def held_out_text(summary: Summary) -> str:
    """The last evaluation, its perplexity beside those of a unigram and a bigram model of the same data."""
    evaluation = summary.evaluation
    if evaluation is None:
        return ""
    return f"{', '.join(evaluation_words(evaluation, summary.facts))} (step {evaluation.step})"


def evaluation_words(evaluation: Evaluation, facts: Mapping[str, Any]) -> list[str]:
    """`loss 2.739`, `perplexity 15.5 against ...`, and each of the user's metrics."""
    words = [f"loss {figure(evaluation.loss)}"] if evaluation.loss is not None else []
    if evaluation.perplexity is not None:
        words.append(f"perplexity {evaluation.perplexity:.1f}" + _peers_text(evaluation.perplexity, facts))
    return words + [f"{name} {value:.4g}" for name, value in evaluation.metrics.items()]


def _peers_text(perplexity: float, facts: Mapping[str, Any]) -> str:
    peers = []
    for name in ("unigram", "bigram"):
        value = finite(dict(facts), f"{name}_perplexity")
        if value is not None:
            ratio = f" ({value / perplexity:.1f}x)" if perplexity > 0 and math.isfinite(value / perplexity) else ""
            peers.append(f"{name} {value:.1f}{ratio}")
    return f" against {', '.join(peers)}" if peers else ""


def rate_text(summary: Summary) -> str:
    rate = summary.rate
    words = [f"{format_count(rate.tokens_s)} tokens/s"] if rate.tokens_s else []
    words += [f"{format_count(rate.samples_s)} samples/s"] if rate.samples_s else []
    words += [f"{percent(rate.flop_share)} of the cluster's peak FLOP/s"] if rate.flop_share else []
    return ", ".join(words)


def shares_text(time: Mapping[str, float]) -> str:
    """`compute 81 %, communicate 9 %, ...`."""
    return ", ".join(f"{PART_NAMES.get(part, part)} {percent(share)}" for part, share in time.items())


def timeline_lines(summary: Summary) -> list[str]:
    """`rank 0: forward 29 %, backward 49 %, ..., bubble 18 %` for the first MOST_RANKS ranks."""
    lines, bubbles = [], summary.timeline.bubbles
    for rank, spent in list(summary.timeline.shares.items())[:MOST_RANKS]:
        words = [f"{NAMES.get(kind, kind)} {percent(share)}" for kind, share in spent.items() if share]
        words += [f"bubble {percent(bubbles[rank])}"] if rank in bubbles else []
        lines.append(f"rank {rank}: {', '.join(words)}")
    return lines


def checkpoint_text(summary: Summary) -> str:
    if not summary.checkpoints:
        return ""
    last = summary.checkpoints[-1]
    cost = f"{format_bytes(last.num_bytes)} in {format_seconds(last.seconds)}"
    return f"{last.path or f'step {last.step}'}, {cost}, {plural(len(summary.checkpoints), 'save')} in all"


def facts_text(facts: Mapping[str, Any]) -> str:
    """`4.1 M tokens, 1683 documents, vocab 4096`: the facts that are counts."""
    known = dict(facts)
    counts = [(name, whole(known, name)) for name in SHOWN_FACTS]
    words = [f"{_count(value)} {name}" for name, value in counts if value is not None]
    vocab = whole(known, "vocab")
    return ", ".join(words + ([f"vocab {vocab}"] if vocab is not None else []))


def compared_lines(compared: Sequence[Compared]) -> list[str]:
    """A table: predicted, measured, and measured over predicted."""
    if not compared:
        return []
    lines = [f"{'':<{LABEL_WIDTH}}{'predicted':>12}{'measured':>12}{'ratio':>9}"]
    for row in compared:
        shown = format_seconds if row.unit == "s" else format_bytes
        lines.append(f"{row.name:<{LABEL_WIDTH}}{shown(row.predicted):>12}{shown(row.measured):>12}{ratio(row):>9}")
    return lines


def ratio(row: Compared) -> str:
    """Measured over predicted: above 1 it took more than predicted; `-` without a prediction."""
    return f"{row.measured / row.predicted:.3g}x" if row.predicted > 0 else "-"


def figure(value: float | None) -> str:
    """A loss: three decimals, or four digits where that says little."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.1 <= abs(value) < 1e5 or value == 0 or not math.isfinite(value) else f"{value:.4g}"


def percent(share: float) -> str:
    """0.812 -> `81 %`; 0.004 -> `0.4 %`."""
    value = 100 * share
    return f"{value:.1f} %" if 0.05 <= value < 1.95 else f"{value:.0f} %"


def plural(count: int | None, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _count(value: int) -> str:
    return str(value) if abs(value) < 10_000 else format_count(value)


def labelled(topics: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{label:<{LABEL_WIDTH}}{text}" for label, text in topics if text]
