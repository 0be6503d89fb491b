"""Peak memory of each feature that saves some, against the least by arithmetic; and a GPT larger than its memory."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.case import Case
from bench.launched import Launched
from bench.options import Options, say
from bench.peers import PYTHON
from bench.rounds import Lost, play
from bench.rows import Row, row

SMALL = Case(precision="float32", batch=4, ranks=1, layers=18, width=768, heads=12, vocab=32768, context=256)
LARGE = Case(precision="float32", batch=1, ranks=1, layers=19, width=2048, heads=16, vocab=32768, context=256)
QUICK = Case(precision="float32", batch=4, ranks=1, layers=4, width=256, heads=4, vocab=4096, context=128)
LIMIT_BYTES = 10 * 10**9
ROUNDS, STEPS, LARGE_STEPS = 2, 2, 10
DEADLINE_S = 3600.0

HALF = "precision=bfloat16,parameters=bfloat16"
BASE, STATELESS = "shardwise", "shardwise:no states"
PLANS = {  # system -> plan, and the optimizer
    BASE: ("data=1", "adamw"),
    STATELESS: ("data=1", "sgd"),
    "shardwise:recompute=full": ("recompute=full", "adamw"),
    "shardwise:recompute=selective": ("recompute=selective", "adamw"),
    "shardwise:recompute.blocks=0..8": (f"recompute=blocks,recompute.blocks={'+'.join(map(str, range(9)))}", "adamw"),
    "shardwise:offload.activations=disk": ("offload.activations=disk", "adamw"),
    "shardwise:states=bfloat16": ("states=bfloat16", "adamw"),
    "shardwise:states=int8": ("states=int8", "adamw"),
    "shardwise:precision=bfloat16": ("precision=bfloat16", "adamw"),
    "shardwise:parameters=bfloat16": (HALF, "adamw"),
    "shardwise:parameters=bfloat16 master=none": (f"{HALF},master=none", "adamw"),
    "shardwise:parameters=bfloat16 master=none states=int8": (f"{HALF},master=none,states=int8", "adamw"),
    "shardwise:offload.optimizer=disk": ("offload.optimizer=disk", "adamw"),
    "shardwise:all on disk and recompute=full": (f"{HALF},offload.optimizer=disk,recompute=full", "adamw"),
}
FAST = (BASE, "shardwise:recompute=full", "shardwise:offload.optimizer=disk")
LARGE_PLANS = {
    "shardwise:float32 with states on disk": "offload.optimizer=disk,recompute=full",
    "shardwise:bfloat16 with masters and states on disk": f"{HALF},offload.optimizer=disk,recompute=full",
}


def run(options: Options) -> list[Row]:
    """The features on a GPT of 150 M parameters, then ten steps of one of a billion under a limit."""
    rows: list[Row] = []
    case, title = (QUICK, "GPT of 4 M parameters") if options.quick else (SMALL, "GPT of 150 M parameters")
    if options.wants(title):
        rows += features(title, case, options)
        options.keep(rows)
    title = f"GPT of 1 billion parameters in {LIMIT_BYTES // 10**9} GB"
    if options.wants(title) and not options.quick:
        rows += large(title, options)
    return rows


def features(title: str, case: Case, options: Options) -> list[Row]:
    """Each plan in a process of its own."""
    names = options.chosen(list(PLANS), FAST)
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    say(f"{title}: {rounds} rounds of {STEPS} steps")
    found: dict[str, dict[str, Any]] = {}

    def turn(name: str) -> float:
        found[name] = measured(case, *PLANS[name], steps=STEPS)
        say(f"  {name}: {found[name]['peak'] - found[name]['empty']:,} bytes")
        return float(found[name]["peak"] - found[name]["empty"])

    outcomes = play(names, rounds, turn)
    rows: list[Row] = []
    for name in names:
        values, note = outcomes[name].values, outcomes[name].note
        about = found.get(name, {})
        rows.append(row(title, name, "peak_bytes", "B", "lower", values, note=note, plan=PLANS[name][0]))
        if about:
            least = about["least"]
            rows.append(row(title, name, "least_bytes", "B", "lower", [least]))
            rows.append(row(title, name, "ratio_to_least", "x", "lower", [value / least for value in values]))
            losses = about["losses"]
            rows.append(row(title, name, "step_time", "s", "lower", about["seconds"][1:], first_losses=losses))
    return rows + _offloaded(title, found)


def _offloaded(title: str, found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """What states on disk take in memory: the buffers that they are read into and written from."""
    name = "shardwise:offload.optimizer=disk"
    if name not in found:
        return []
    target = f"<= {found[name]['block_states']:,} (the states of one block)"
    return [row(title, name, "bytes_of_offloaded_states", "B", "lower", [found[name]["buffered"]], target=target)]


def large(title: str, options: Options) -> list[Row]:
    """Ten steps of AdamW under a limit that counts the file cache."""
    rows: list[Row] = []
    for name in options.chosen(list(LARGE_PLANS), ()):
        say(f"{title}: {name}")
        try:
            found = measured(LARGE, LARGE_PLANS[name], "adamw", steps=LARGE_STEPS, limit_bytes=LIMIT_BYTES)
        except Lost as lost:
            rows.append(row(title, name, "peak_bytes", "B", "lower", [math.inf], note=str(lost)))
            continue
        grouped = "group_peak" in found
        note = (
            f"memory and file cache charged to a control group with a limit of {found['group_limit']:,}"
            if grouped
            else "no control group could be made: the peak of resident memory, files and all"
        )
        peak = found["group_peak"] if grouped else found["peak"]
        target = f"<= {LIMIT_BYTES:,}"
        more = {"note": note, "plan": LARGE_PLANS[name], "parameters": found["parameters"], "losses": found["losses"]}
        rows.append(row(title, name, "peak_bytes", "B", "lower", [peak], target=target, **more))
        rows.append(row(title, name, "anonymous_bytes", "B", "lower", [found["anonymous"]]))
        rows.append(row(title, name, "step_time", "s", "lower", found["seconds"]))
        plain = row(title, "limit", "peak_bytes", "B", "lower", [16 * found["parameters"]], note="16 bytes a parameter")
        rows += [plain] if plain not in rows else []
    return rows


def measured(case: Case, plan: str, optimizer: str, *, steps: int, limit_bytes: int = 0) -> dict[str, Any]:
    """What the subject says at its end. Raises Lost."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        command = [PYTHON, "-m", "bench.subjects.memory", plan, optimizer, str(steps)]
        if limit_bytes:
            command = [PYTHON, "-m", "bench.cgroup", str(limit_bytes), *command]
        env = replace(case, folder=folder).environment() | ({"OMP_NUM_THREADS": "2"} if limit_bytes else {})
        launched = Launched(command, env=env)
        try:
            launched.start()
            if not launched.wait(DEADLINE_S):
                raise Lost(f"hung: no end within {DEADLINE_S:.0f} s; {launched.tail()}")
            if launched.status:
                raise Lost(f"ended with status {launched.status}; {launched.tail()}")
            answer: dict[str, Any] = json.loads(launched.log.read_text().splitlines()[-1])
            return answer
        finally:
            launched.close(grace_s=0.0)
