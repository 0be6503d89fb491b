"""Peak memory of steps under a plan, in this process alone: `python -m bench.subjects.memory PLAN OPTIMIZER STEPS`.

The model and the batch come from the environment as the harness puts them there. The last line of the output is JSON:
peaks in bytes after the model was built, the least that arithmetic allows, seconds and losses of the steps.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import cgroup
from bench.case import Case, pseudo_text
from bench.work import model, optimizer
from shardwise.comm.mesh import connect
from shardwise.models.losses import next_token_loss
from shardwise.models.profile import profile
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.parallel.updates import PiecewiseUpdates
from shardwise.plan.formats import repeated
from shardwise.plan.memory import memory_parts
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan, build_plan, parse_plan
from shardwise.spec.profile import ModelProfile


class Micro:
    """A microbatch of one sample after the other."""

    shard = None

    def __init__(self, case: Case, number: int) -> None:
        rows = pseudo_text(case.batch * (case.context + 1), case.vocab, 1000 + number)
        tokens = torch.from_numpy(rows.astype("int64")).view(case.batch, case.context + 1)
        self.batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        self.stream = number


def memory() -> dict[str, int]:
    """Bytes now and at the peak, as the system counts them for this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items()}


def forget_peak() -> None:
    """The peak begins anew with what is resident now, without what the allocator holds for nobody."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(text: str, kind: str, steps: int) -> dict[str, Any]:
    case, plan = Case.from_environment(), build_plan(parse_plan(text))
    empty = memory()["resident"]
    module = model(case)
    example = Micro(case, 0).batch
    cost = least(profile(module, example, loss=next_token_loss), plan, case, states=8 if kind == "adamw" else 0)
    mesh = connect(plan, rank=0, world=1, store=None)
    replica = parallelize(module, plan, mesh, scratch=case.folder)
    sgd = torch.optim.SGD(module.parameters(), lr=case.lr)
    chosen = optimizer(case, module.parameters()) if kind == "adamw" else sgd
    forget_peak()
    seconds, losses, anonymous = [], [], 0
    for number in range(steps):
        began = time.perf_counter()
        losses.append(step(replica, [chosen], [Micro(case, number)], loss=next_token_loss).loss)
        seconds.append(time.perf_counter() - began)
        anonymous = max(anonymous, memory()["anonymous"])
        print(f"step {number + 1}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    found = {"empty": empty, "peak": memory()["peak"], "anonymous": anonymous, **cost, **cgroup.charged()}
    found["buffered"] = replica.updates.buffered if isinstance(replica.updates, PiecewiseUpdates) else 0
    replica.close()
    return {**found, "parameters": sum(p.numel() for p in module.parameters()), "seconds": seconds, "losses": losses}


def least(found: ModelProfile, plan: Plan, case: Case, *, states: int) -> dict[str, int]:
    """Bytes that a step cannot do without: parameters and states, with the gradients or else the activations."""
    job = JobFacts(global_batch=case.batch, steps=1, state_bytes_per_parameter=states)
    parts = memory_parts(found, plan, job, on_cpu=False)
    most = max(parts["gradients"], parts["activations"])
    return {
        "least": parts["parameters"] + parts["optimizer"] + most,
        "block_states": states * repeated(found)[0].parameters,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))) + "\n")
