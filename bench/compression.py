"""What compressed gradients cost in loss and in computing, and what they save: bytes."""

from __future__ import annotations

from typing import Any

from bench.line import Message
from bench.options import Options, say
from bench.peers import torchrun
from bench.rounds import Lost
from bench.rows import Row, ratio, row
from bench.subject import Subject

STEPS, QUICK_STEPS = 300, 30
SEEDS, QUICK_SEEDS = 3, 1
START_S, TRAIN_S = 60.0, 400.0
QUICK = ("all_reduce", "int8")
TRAIN, ALONE = "held-out loss", "computing"

SYSTEMS: dict[str, dict[str, Any]] = {
    "all_reduce": {},
    "bf16": {},
    "bf16:no feedback": {"feedback": False},
    "int8": {},
    "int8:no feedback": {"feedback": False},
    "int4": {},
    "int4:no feedback": {"feedback": False},
    "topk 1 %": {"numbers": {"density": 0.01}},
    "topk 1 %:no feedback": {"numbers": {"density": 0.01}, "feedback": False},
    "topk 1 %:start 100": {"numbers": {"density": 0.01}, "start": 100},
    "powersgd rank 1": {"numbers": {"rank": 1}},
    "powersgd rank 2": {"numbers": {"rank": 2}},
    "powersgd rank 4": {"numbers": {"rank": 4}},
    "powersgd rank 4:no feedback": {"numbers": {"rank": 4}, "feedback": False},
    "powersgd rank 4:start 100": {"numbers": {"rank": 4}, "start": 100},
}


def run(options: Options) -> list[Row]:
    """Every method with every optimizer; the same ranks train one after the other, from the same weights."""
    names = options.chosen(list(SYSTEMS), QUICK)
    subject = Subject(
        "shardwise", torchrun(2, "bench.subjects.compression"), ranks=2, env={"SHARDWISE_TRANSPORT": "shm"}
    )
    rows: list[Row] = []
    try:
        subject.start(START_S)
        for optimizer in ("adamw",) if options.quick else ("adamw", "sgd"):
            case = f"{TRAIN} {optimizer}"
            if options.wants(case):
                rows += trained(subject, case, optimizer, names, options)
        if options.wants(ALONE):
            for name in names:
                if name != "all_reduce" and ":" not in name:
                    rows += alone(subject, name)
    finally:
        subject.close()
    return rows


def trained(subject: Subject, case: str, optimizer: str, names: list[str], options: Options) -> list[Row]:
    """A value for each seed; the ratio to all_reduce is taken seed by seed."""
    steps = QUICK_STEPS if options.quick else STEPS
    seeds = options.rounds or (QUICK_SEEDS if options.quick else SEEDS)
    found: dict[str, list[Message]] = {}
    rows: list[Row] = []
    for name in names:
        say(f"{case}: {name}, {seeds} x {steps} steps")
        asked = {"do": "train", "steps": steps, "optimizer": optimizer, **command(name)}
        try:
            found[name] = [subject.ask(asked | {"seed": seed}, TRAIN_S)[0] for seed in range(seeds)]
        except Lost as lost:
            return [*rows, row(case, name, "loss", "", "lower", [], note=str(lost))]
        losses = [each["loss"] for each in found[name]]
        rows.append(row(case, name, "loss", "", "lower", losses))
        rows.append(row(case, name, "sent", "B/parameter", "lower", [each["bytes"] for each in found[name][:1]]))
        if "all_reduce" in found and name != "all_reduce":
            rows.append(ratio(case, name, "all_reduce", losses, [each["loss"] for each in found["all_reduce"]]))
    return rows


def alone(subject: Subject, name: str) -> list[Row]:
    """Milliseconds of computing for one MB of float32 gradients, beside the wire."""
    answer = subject.ask({"do": "time", **command(name)}, TRAIN_S)[0]
    return [
        row(ALONE, name, "before_sending", "ms/MB", "lower", [answer["before"]]),
        row(ALONE, name, "after_receiving", "ms/MB", "lower", [answer["after"]]),
    ]


def command(name: str) -> Message:
    """What the ranks are told about a system."""
    defaults = {"method": name.split(":")[0].split(" ")[0], "numbers": {}, "feedback": True, "start": 0}
    return defaults | SYSTEMS[name]
