"""`docs/benchmarks.md`, its pictures and the README's table, written from committed results: `python -m bench.page`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.__main__ import BENCHMARKS
from bench.machine import in_words
from bench.plot import dots
from bench.ratio import METHOD
from bench.rows import Row, number

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
README = ROOT / "README.md"
MARKS = ("<!-- data_parallel: written by python -m bench.page -->", "<!-- end -->")
PLOTTED = {
    "data_parallel": "ratio_to_ddp",
    "slow_link": "time_to_loss",
    "param_server": "ratio_to_all_reduce",
}  # the metric of the picture; elsewhere that of the first row
PICTURED = {"collectives": "all_reduce"}  # what the cases of the picture have in their names
WIDE = ("collectives",)  # benchmarks with many small cases: a line for each, a column for each system
TABLE = ("| system | metric | median | range or interval | target | |", "|---|---|--:|---|---|---|")
HEAD = f"""\
# Benchmarks

<!-- Written by `python -m bench.page` from `bench/results/*.json`. Do not edit. -->

Every claim about speed is a program that anybody can run: `python -m bench` lists them, `python -m bench NAME` runs
one beside its peers, `make bench` runs all. All systems of a case are alive at the same time and take turns; each is
launched by its own launcher with the settings that its documentation recommends, and what they compute is compared.
Ratios are taken round by round; their interval is a {METHOD}.
"""


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Write the page and one picture for each result in `results`; returns the files."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    names = sorted(found, key=lambda name: (list(BENCHMARKS).index(benchmark_of(name)), name))
    pictures = docs / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    parts = [HEAD]
    for name in names:
        picture = pictures / f"bench-{name}.svg"
        rows = plotted(name, found[name]["rows"])
        picture.write_text(dots(f"{name}: {rows[0]['metric']}" if rows else name, rows))
        parts.append(section(name, found[name], picture.relative_to(docs)))
        written.append(picture)
    page = docs / "benchmarks.md"
    page.write_text("\n".join(parts))
    return [page, *written]


def write_readme(results: Path = RESULTS, readme: Path = README) -> None:
    """Fill the README's table, between its two marks, with the ratios of `data_parallel`."""
    rows = json.loads((results / "data_parallel.json").read_text())["rows"]
    text = readme.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(f"{before}{MARKS[0]}\n{ratio_table(rows)}\n{MARKS[1]}{after}")


def ratio_table(rows: Sequence[Row]) -> str:
    """One line a case, one column a system: the median of its ratio to plain DDP and the interval."""
    ratios = [row for row in rows if row["metric"] == "ratio_to_ddp"]
    systems = list(dict.fromkeys(row["system"] for row in ratios))
    lines = [f"| case (batch a rank) | {' | '.join(systems)} |", "|---" * (1 + len(systems)) + "|"]
    for case in dict.fromkeys(row["case"] for row in ratios):
        found = {row["system"]: row for row in ratios if row["case"] == case}
        cells = [_cell(each) for each in map(found.__getitem__, systems)]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Row) -> str:
    if math.isinf(found["median"]):
        return "lost"
    return f"{found['median']:.3f} ({found['low']:.3f} - {found['high']:.3f})"


def benchmark_of(name: str) -> str:
    """`data_parallel-h100` holds a result of `data_parallel`, on another machine."""
    return name.split("-")[0]


def plotted(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of the metric that the picture shows."""
    metric = PLOTTED.get(benchmark_of(name)) or (rows[0]["metric"] if rows else "")
    return [row for row in rows if row["metric"] == metric and PICTURED.get(benchmark_of(name), "") in row["case"]]


def section(name: str, document: Mapping[str, Any], picture: Path) -> str:
    """One benchmark in Markdown: what it measures, on which machine, the picture, and a table for each case."""
    what = BENCHMARKS[benchmark_of(name)]
    lines = [f"## {name}", "", what[0].upper() + what[1:] + ".", ""]
    lines += [
        f"`python -m bench {benchmark_of(name)}` on: {in_words(dict(document['machine']))}.",
        "",
        f"![{name}]({picture})",
        "",
    ]
    cases = list(dict.fromkeys(row["case"] for row in document["rows"]))
    if benchmark_of(name) in WIDE:
        return "\n".join([*lines, *_wide(cases, document["rows"]), ""])
    for case in cases:
        lines += [
            f"### {case}",
            "",
            "| system | metric | median | range or interval | target | |",
            "|---|---|--:|---|---|---|",
        ]
        lines += [_table_line(row) for row in document["rows"] if row["case"] == case]
        lines.append("")
    return "\n".join(lines)


def _wide(cases: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """One table of all cases: each system's median of the case's first metric, and what has a target."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = [f"| case | {' | '.join(systems)} | beside its target |", f"|---|{'--:|' * len(systems)}---|"]
    for case in cases:
        here = [row for row in rows if row["case"] == case]
        first = {row["system"]: row for row in here if row["metric"] == here[0]["metric"] and "missing" not in row}
        medians = [f"{number(first[s]['median'])} {first[s]['unit']}" if s in first else "" for s in systems]
        told = [f"{row['system']} {row['metric']} {number(row['median'])} ({row['target']})" for row in _aimed(here)]
        lines.append(f"| {case} | {' | '.join(medians)} | {'; '.join(told)} |")
    return lines


def _aimed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("target") and row.get("median") is not None]


def _table_line(row: Row) -> str:
    if "missing" in row:
        why = str(row["missing"])
        said = f"not installed: `{why}`" if "install" in why else why.replace("|", "\\|")
        return f"| {row['system']} | {row['metric']} | - | | | {said} |"
    spread = ""
    if row.get("low") is not None:
        spread = f"{number(row['low'])} .. {number(row['high'])}"
    elif len(row["values"]) > 1:
        spread = f"{number(min(row['values']))} .. {number(max(row['values']))}"
    median = f"{number(row['median'])} {row['unit']}".strip()
    note = str(row.get("note", "")).replace("|", "\\|")
    return f"| {row['system']} | {row['metric']} | {median} | {spread} | {row['target'] or ''} | {note} |"


if __name__ == "__main__":
    sys.stdout.write("".join(f"{path}\n" for path in write_page()))
    write_readme()
