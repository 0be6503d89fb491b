"""A calibration as tables of text: latency and bandwidth from each rank to each other, and seconds by size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from msgspec import Struct

from shardwise.spec.cluster import Calibration, Link
from shardwise.units import format_bytes, format_seconds

WIDEST = 8  # ranks: beyond, a pair is one character
SHADES = " .:-=+*#%@"  # low to high


class Table(Struct, frozen=True, kw_only=True):
    """Rows under headings; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def matrices(calibration: Calibration) -> tuple[Table, Table]:
    """Latency and bandwidth, a row for each sending rank and a column for each receiving one."""
    return (
        _matrix(calibration, "latency", lambda link: link.latency_s, format_seconds),
        _matrix(calibration, "bandwidth", lambda link: link.bandwidth, lambda rate: f"{format_bytes(rate)}/s"),
    )


def collectives_table(calibration: Calibration) -> Table:
    """Seconds of each operation by the bytes of the whole tensor."""
    sizes = sorted({size for rows in calibration.collectives.values() for size, _ in rows if size})
    rows = [
        (name, *(format_seconds(known[size]) if size in known else "-" for size in sizes))
        for name, found in calibration.collectives.items()
        if (known := dict(found)).keys() - {0}
    ]
    bare = [
        (name, *(format_seconds(found[0][1]), *[""] * (len(sizes) - 1)))
        for name, found in calibration.collectives.items()
        if sizes and [size for size, _ in found] == [0]
    ]
    return Table(
        title="collectives, by the bytes of the whole tensor",
        head=("", *map(format_bytes, sizes)),
        rows=tuple((*rows, *bare)),
    )


def _matrix(calibration: Calibration, what: str, value: Callable[[Link], float], said: Callable[[float], str]) -> Table:
    known = {(pair.source, pair.target): value(pair.link) for pair in calibration.pairs}
    ranks = range(calibration.ranks)
    if len(ranks) <= WIDEST:
        rows = [(f"rank {a}", *(said(known[a, b]) if (a, b) in known else "-" for b in ranks)) for a in ranks]
        return Table(title=f"{what}, from a rank to another", head=("", *(f"to {b}" for b in ranks)), rows=tuple(rows))
    scale = _shades(list(known.values()))
    lines = [(f"rank {a}", "".join(scale(known.get((a, b))) for b in ranks)) for a in ranks]
    low, high = (min(known.values()), max(known.values())) if known else (0.0, 0.0)
    span = f"'{SHADES[1]}' is {said(low)}, '{SHADES[-1]}' is {said(high)}" if known else "nothing was measured"
    return Table(title=f"{what}, from a rank (row) to another (column): {span}", head=("", ""), rows=tuple(lines))


def _shades(values: Sequence[float]) -> Callable[[float | None], str]:
    """One character for a value, by its logarithm between the lowest and the highest; blank where there is none."""
    logs = [math.log(max(value, 1e-12)) for value in values] or [0.0]
    low, span = min(logs), max(logs) - min(logs)

    def shade(value: float | None) -> str:
        if value is None:
            return SHADES[0]
        place = (math.log(max(value, 1e-12)) - low) / span if span > 0 else 0.0
        return SHADES[1 + round(place * (len(SHADES) - 2))]

    return shade
