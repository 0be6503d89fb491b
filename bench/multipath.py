"""One gradient bucket over two unlike links at once, against the faster link alone and gloo: rows of `slow_link`.

`rows(options)` makes its own namespaces; without root it returns the rows of a system that is missing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.launched import ROOT
from bench.links import Links, unavailable
from bench.options import Options, say
from bench.rounds import Lost
from bench.rows import Row, missing, ratio, row

RATES_MBIT = (100, 50)
BUCKET, QUICK_BUCKET = 25 << 20, 4 << 20  # bytes
ROUNDS, QUICK_ROUNDS = 8, 3
PORT = 29377  # in a namespace of its own
SYSTEMS = {"shardwise": "both links", "shardwise:one": "the faster link", "gloo": "the faster link", "gloo:two": "both"}
REACH = 0.9
LIMIT_S = 400.0


def rows(options: Options) -> list[Row]:
    """Seconds an all-reduce of the bucket between two hosts, and its share of the links' summed bandwidth."""
    nbytes = QUICK_BUCKET if options.quick else BUCKET
    case = f"{nbytes >> 20} MB over {' + '.join(map(str, RATES_MBIT))} Mbit"
    if not options.wants(case):
        return []
    if why := unavailable():
        say(f"{case} is skipped: {why}")
        return [missing(case, name, "time", "s", "lower", why) for name in SYSTEMS]
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    say(f"{case}: {rounds} rounds")
    try:
        with Links(RATES_MBIT) as links:
            seconds = measure(links, list(SYSTEMS), nbytes, rounds)
    except Lost as lost:
        say(f"{case} is skipped: {lost}")
        return [missing(case, name, "time", "s", "lower", str(lost)) for name in SYSTEMS]
    return rows_of(case, nbytes, seconds)


def rows_of(case: str, nbytes: int, seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """With two ranks each sends the bucket's bytes once, however it is done: bytes / time is the bandwidth used."""
    summed = sum(RATES_MBIT) * 1e6 / 8
    found: list[Row] = []
    for name, values in seconds.items():
        found.append(row(case, name, "time", "s", "lower", values, note=SYSTEMS[name]))
        shares = [nbytes / value / summed for value in values]
        target = f">= {REACH}" if name == "shardwise" else None
        found.append(row(case, name, "share_of_summed_bandwidth", "", "higher", shares, target=target))
    if {"shardwise", "gloo"} <= set(seconds):
        found.append(ratio(case, "shardwise", "gloo", seconds["shardwise"], seconds["gloo"]))
    return found


def measure(links: Links, systems: Sequence[str], nbytes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each system's rounds, in turns, between a rank at each end. Raises Lost."""
    program = [sys.executable, "-m", "bench.subjects.multipath", links.address(0), str(PORT)]
    program += [",".join(systems), str(nbytes), str(rounds)]
    processes = [
        subprocess.Popen([*links.inside(rank), *program, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        said = processes[0].communicate(timeout=LIMIT_S)[0]
        if processes[0].returncode or processes[1].wait(20):
            raise Lost("a rank ended with an error; it is on the standard error stream")
    except subprocess.TimeoutExpired:
        raise Lost(f"the ranks did not end within {LIMIT_S:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, list[float]] = json.loads(said.splitlines()[-1])
    for name, values in found.items():
        say(f"  {name}: {statistics.median(values):.3f} s")
    return found
