"""`StepResult.comm_s`: the time that a step waits for other ranks, wherever it does, and nothing else."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.plan.buckets import usual_bucket_bytes
from shardwise.spec.plan import Plan
from shardwise.spec.sync import Sync
from tests.cpu.parallel import jobs
from tests.ranks import Rank, run_ranks

LATE_S = 0.15


class Late(nn.Module):
    """A linear layer, before it perhaps a batch norm; rank 1 is late in forward."""

    def __init__(self, rank: int, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rank = rank
        self.late = False
        self.norm = nn.BatchNorm1d(jobs.FEATURES) if norm else nn.Identity()
        self.linear = nn.Linear(jobs.FEATURES, jobs.OUTPUTS)

    def forward(self, input: Tensor) -> Tensor:
        if self.late and self.rank == 1:
            time.sleep(LATE_S)
        out: Tensor = self.linear(self.norm(input))
        return out


class Exchanging(torch.optim.SGD):
    """An optimizer that meets the other ranks after rank 1 was late once more."""

    group: Any = None
    late_rank = 1

    def step(self, closure: Any = None) -> Any:
        if self.group is not None:
            if self.group.rank() == self.late_rank:
                time.sleep(LATE_S)
            self.group.all_reduce(torch.ones(1)).wait()
        return super().step(closure)


def trained(rank: Rank, norm: bool, coupled: Any, meets: bool) -> Any:
    module = Late(rank.rank, norm)
    plan = Plan(data=rank.world)
    mesh = rank.mesh(plan)
    replica = parallelize(module, plan, mesh, coupled=coupled)
    optimizer = Exchanging(module.parameters(), lr=0.1)
    results = []
    for number in range(3):
        micro = jobs.share(number, 8, rank.rank, rank.world)
        if number == 2:
            module.late = not meets
            optimizer.group = mesh.axis("data").group if meets else None
            mesh.axis("data").group.barrier().wait()  # type: ignore[union-attr]
        began = time.perf_counter()
        found = step(replica, [optimizer], micro, loss=jobs.loss)
        results.append((found, time.perf_counter() - began))
    return results[-1]


@pytest.mark.parametrize(
    ("norm", "coupled", "meets"),
    [(False, "refuse", False), (True, "refuse", False), (False, "gather", False), (False, "refuse", True)],
    ids=["gradients", "batch norm in forward", "gathered outputs", "an exchange in the optimizer"],
)
def test_the_early_rank_waits_for_the_late_one_and_computes_no_longer_for_it(
    norm: bool, coupled: str, meets: bool
) -> None:
    (early, early_s), (late, late_s) = run_ranks(2, trained, norm, coupled, meets)
    assert early.comm_s > 0.8 * LATE_S > 0.5 * LATE_S > late.comm_s
    assert early.compute_s + early.optimizer_s < 0.5 * LATE_S < late.compute_s + late.optimizer_s
    for found, seconds in ((early, early_s), (late, late_s)):
        parts = found.compute_s + found.comm_s + found.optimizer_s
        assert min(found.compute_s, found.comm_s, found.optimizer_s) >= 0
        assert parts == pytest.approx(seconds, abs=0.03), "the parts are the step"


def bucketed(rank: Rank, bytes_in_plan: int) -> Any:
    plan = Plan(data=rank.world, sync=Sync(bucket_bytes=bytes_in_plan))
    mesh = rank.mesh(plan)
    group = mesh.axis("data").group
    assert group is not None
    replica = parallelize(nn.Linear(1000, 500), plan, mesh)
    return group.transport, replica.reducer._bucket_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("transport", ["gloo", "auto"])
def test_ranks_take_the_size_that_their_transport_asks_for_unless_the_plan_has_one(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", transport)
    first, second = run_ranks(2, bucketed, 0)
    assert first == second
    assert first[1] == usual_bucket_bytes(4 * 500 * 1001, 2, first[0])
    assert run_ranks(2, bucketed, 4321)[0][1] == 4321
