"""A checkpoint of any layout goes on in any other as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_pipelined import CLOSE, cut, loss, made, share

from shardwise.checkpoint.store import LocalStore
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan
from shardwise.train.state import Saver, State
from tests.ranks import Rank, run_ranks

HALF, ALL = 4, 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "data": {"data": 2},
    "pipeline": {"pipeline": 2},
    "zero 1": {"shard": 2, "zero": 1},
    "zero 2": {"shard": 3, "zero": 2},
    "zero 3": {"shard": 2, "zero": 3},
    "replicas of shards": {"data": 2, "shard": 2, "zero": 3},
    "shards of stages": {"shard": 2, "pipeline": 2, "zero": 3},
    "all": {"data": 2, "shard": 2, "pipeline": 2, "zero": 1},
}
SAMPLES = Plan(shard=2, data=1)  # the shares of a step, however many ranks compute them


def trained(rank: Rank, name: str, plan: Plan, place: str, steps: tuple[int, int]) -> list[float]:
    """Go on from the checkpoint in `place`, if there is one, through `steps`, and save."""
    mesh = rank.mesh(plan)
    replica = parallelize(made(name), plan, mesh)
    optimizers: Any = SimpleNamespace(optimizers=[torch.optim.AdamW(replica.module.parameters(), lr=0.01)])
    job: Any = SimpleNamespace(keep_last=2)
    saver = Saver(None, mesh, job)
    saver.store, saver.kept = LocalStore(Path(place)), True
    state = saver.resume(replica, optimizers)
    assert state.step == steps[0]
    axis = mesh.axis("batch")
    losses = []
    for number in range(*steps):
        micro = [one for part in range(6) for one in share(name, number, part, SAMPLES)[:1]]
        # Four ranks cannot share six microbatches alike: each computes them all, which is the same mean.
        mine = micro[axis.rank * 6 // axis.size : (axis.rank + 1) * 6 // axis.size]
        losses.append(step(replica, optimizers.optimizers, mine if plan.replicas != 4 else micro, loss=loss).loss)
    saver.save(replica, optimizers, State(step=steps[1], loss=losses[-1]), best=False)
    return losses


def plan_of(name: str, layout: str) -> Plan:
    plan = Plan(precision="float64", microbatches=2, **LAYOUTS[layout])
    return cut(name, plan) if plan.pipeline > 1 else plan


QUICK = {("zero 3", "one"), ("replicas of shards", "zero 2")}
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_a_checkpoint_goes_on_in_another_layout(before: str, after: str, tmp_path: Path) -> None:
    expected = run_ranks(1, trained, "tied", plan_of("tied", "one"), str(tmp_path / "whole"), (0, ALL))[0]
    place = str(tmp_path / "moved")
    first, second = plan_of("tied", before), plan_of("tied", after)
    for found in run_ranks(first.ranks, trained, "tied", first, place, (0, HALF)):
        assert found == pytest.approx(expected[:HALF], rel=CLOSE)
    for found in run_ranks(second.ranks, trained, "tied", second, place, (HALF, ALL)):
        assert found == pytest.approx(expected[HALF:], rel=CLOSE)
