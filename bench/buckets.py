"""Seconds a training step by the size of gradient buckets: the chosen one against fixed ones, over shm and gloo."""

from __future__ import annotations

from bench.case import Case
from bench.data_parallel import cases, run_case
from bench.options import Options
from bench.peers import ROOT, SHARDWISE, Peer
from bench.rows import Row, ratio

BASE = "25 MB"
SIZES = {"chosen": 0, "256 KB": 256_000, "1 MB": 1_000_000, "4 MB": 4_000_000, BASE: 25_000_000, "100 MB": 100_000_000}
QUICK = ("chosen", BASE)
TRANSPORTS = ("shm", "gloo")
TARGET = "<= 1.0"


def run(options: Options) -> list[Row]:
    """The cases of `data_parallel` over each transport; under `--quick` one of them."""
    names = options.chosen(list(SIZES), QUICK)
    rows: list[Row] = []
    for transport in TRANSPORTS[:1] if options.quick else TRANSPORTS:
        for case in cases(options):
            title = f"{transport} {case}"
            if options.wants(title):
                rows += titled(title, run_case(case, names, options, peers=peers(transport)))
    return rows


def peers(transport: str) -> dict[str, Peer]:
    """One system for each size; they differ in nothing else."""
    return {name: _peer(transport, nbytes) for name, nbytes in SIZES.items()}


def titled(title: str, found: list[Row]) -> list[Row]:
    """The step times under the case's name, and the ratio of the chosen size to today's other default."""
    times = {each["system"]: each for each in found if each["metric"] == "step_time"}
    rows = [{**each, "case": title, "target": None} for each in times.values()]
    if {"chosen", BASE} <= times.keys():
        rows.append(ratio(title, "chosen", BASE, times["chosen"]["values"], times[BASE]["values"], target=TARGET))
    return rows


def _peer(transport: str, nbytes: int) -> Peer:
    def command(case: Case) -> list[str]:
        plan = f"data={case.ranks},sync.bucket_bytes={nbytes}" if nbytes else f"data={case.ranks}"
        return [*SHARDWISE, "train", str(ROOT / "bench" / "jobs" / "data_parallel.py"), "--plan", plan]

    return Peer("shardwise", "pip install -e .", command, env={"SHARDWISE_TRANSPORT": transport})
