"""Rows of a result, the file that holds them, and the table that the terminal shows."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.ratio import METHOD, interval, paired

Row = dict[str, Any]


def row(
    case: str,
    system: str,
    metric: str,
    unit: str,
    better: str,
    values: Sequence[float],
    *,
    target: str | None = None,
    **more: Any,
) -> Row:
    """One row; `median` is None without values, and infinite when most rounds hung."""
    found: Row = {"case": case, "system": system, "metric": metric, "unit": unit, "better": better}
    found |= {"values": list(values), "median": statistics.median(values) if values else None, "target": target}
    return found | {name: value for name, value in more.items() if value is not None}


def missing(case: str, system: str, metric: str, unit: str, better: str, install: str) -> Row:
    """The row of a peer that is not installed, with the command that installs it."""
    return row(case, system, metric, unit, better, [], missing=install)


def ratio(
    case: str,
    system: str,
    base: str,
    values: Sequence[float],
    others: Sequence[float],
    *,
    better: str = "lower",
    target: str | None = None,
) -> Row:
    """The row `ratio_to_<base>`: one paired ratio a round, their median and its interval `low` to `high`."""
    ratios = paired(values, others)
    low, high = interval(ratios) if ratios else (None, None)
    metric = f"ratio_to_{base}"
    return row(case, system, metric, "x", better, ratios, target=target, low=low, high=high, interval=METHOD)


def result(bench: str, machine: dict[str, Any], rows: Iterable[Row], *, quick: bool) -> dict[str, Any]:
    """The whole JSON document of one run."""
    return {"bench": bench, "quick": quick, "machine": machine, "rows": list(rows)}


def of_another(path: str | os.PathLike[str], machine: dict[str, Any]) -> bool:
    """Whether there is a result from another kind of machine."""
    file = Path(path)
    kinds = [json.loads(file.read_text())["machine"], machine] if file.exists() else []
    return len({json.dumps({**kind, "load_average": None}, sort_keys=True) for kind in kinds}) > 1


def other_cases(path: str | os.PathLike[str], rows: Sequence[Row], machine: dict[str, Any]) -> list[Row]:
    """The rows of a result written earlier on this kind of machine, but for the cases of `rows`."""
    file = Path(path)
    if not file.exists() or of_another(path, machine):
        return []
    old = json.loads(file.read_text())
    again = {each["case"] for each in rows}
    return [each for each in old["rows"] if each["case"] not in again]


def write(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Write a result. An infinite value is written as Python's `json` writes and reads it: `Infinity`."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(file)


def table(rows: Sequence[Row]) -> str:
    """Aligned lines for the terminal, one a row, grouped as they come."""
    lines: list[tuple[str, ...]] = [("case", "system", "metric", "median", "range or interval", "target", "")]
    lines += [_cells(each) for each in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def number(value: float | None) -> str:
    """Four significant digits, with thousands in full."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _cells(each: Row) -> tuple[str, ...]:
    head = (each["case"], each["system"], each["metric"])
    if "missing" in each:
        return (*head, "missing", "", "", each["missing"])
    unit = f" {each['unit']}" if each["unit"] else ""
    spread = ""
    if each.get("low") is not None:
        spread = f"{number(each['low'])} .. {number(each['high'])}"
    elif len(each["values"]) > 1:
        spread = f"{number(min(each['values']))} .. {number(max(each['values']))}"
    return (*head, number(each["median"]) + unit, spread, each["target"] or "", each.get("note", ""))
