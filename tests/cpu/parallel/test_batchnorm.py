"""Batch norms over ranks against one process on the whole batch in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.data.order import rank_slice
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import evaluate, step
from shardwise.spec.plan import Plan
from tests.cpu.parallel import jobs
from tests.ranks import Rank, run_ranks

STEPS = 3
KINDS = {
    "1d": (nn.BatchNorm1d, ()),
    "1d-length": (nn.BatchNorm1d, (5,)),
    "2d": (nn.BatchNorm2d, (3, 2)),
    "3d": (nn.BatchNorm3d, (2, 2, 2)),
}


class Normed(nn.Module):
    """A batch norm between two others, one of them without learned parameters and with a cumulative average."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        make = KINDS[kind][0]
        self.scale = nn.Parameter(torch.randn(4))
        self.norm = make(4)
        self.plain = make(4, affine=False, momentum=None)

    def forward(self, input: Tensor) -> Tensor:
        shaped = [1, -1, *[1] * (input.dim() - 2)]
        x = self.norm(input * self.scale.view(shaped)).tanh() * self.scale.view(shaped)
        return self.plain(x + input).flatten(1).sum(1)


def batch_of(step: int, samples: int, kind: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    input = torch.randn(samples, 4, *KINDS[kind][1], generator=g, dtype=torch.float64)
    return {"input": input * 3 + 10, "targets": torch.randn(samples, generator=g, dtype=torch.float64)}


def squared(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return (output - batch["targets"]).square().sum() / 100, len(output)


def train(rank: Rank, kind: str, samples: int, pieces: int, cut: int) -> Any:
    """`cut` samples go to all ranks but the last, which gets the rest; 0 shares out evenly."""
    module = Normed(kind)
    plan = Plan(data=rank.world, precision="float64")
    names = list(module.state_dict())
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for s in range(STEPS):
        mine = (
            list(rank_slice(samples, rank.world, rank.rank))
            if not cut
            else list(range(cut) if rank.rank == 0 else range(cut, samples))
        )
        size = -(-len(mine) // pieces) if mine else 1
        whole = batch_of(s, samples, kind)
        micro = [jobs.Micro(jobs.rows(whole, mine[i : i + size]), s) for i in range(0, len(mine), size)]
        losses.append(step(replica, [optimizer], micro, loss=squared).loss)
    assert list(module.state_dict()) == names
    copied = copy.deepcopy(module).eval()
    assert torch.equal(copied(whole["input"]), module.eval()(whole["input"]))
    replica.close()
    assert "forward" not in vars(module.norm)
    return losses, {k: v.double().flatten().tolist() for k, v in module.state_dict().items()}


def oracle(kind: str, samples: int) -> Any:
    module = Normed(kind).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for s in range(STEPS):
        batch = batch_of(s, samples, kind)
        total, weight = squared(module(batch["input"]), batch)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append((total / weight).item())
    return losses, {k: v.double().flatten().tolist() for k, v in module.state_dict().items()}


def check(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, rel=1e-9, abs=1e-10), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_statistics_are_those_of_the_whole_batch(kind: str) -> None:
    expected = oracle(kind, 7)
    for found in run_ranks(2, train, kind, 7, 1, 0):
        check(found, expected)


@pytest.mark.parametrize(("n", "samples", "cut"), [(2, 9, 2), (3, 2, 0)])
def test_uneven_and_empty_ranks(n: int, samples: int, cut: int) -> None:
    expected = oracle("2d", samples)
    for found in run_ranks(n, train, "2d", samples, 1, cut):
        check(found, expected)


def test_ranks_with_unequal_numbers_of_microbatches_agree() -> None:
    """Three microbatches here, two there: the third one's statistics are of one rank, and the other stands in."""
    found = run_ranks(2, train, "2d", 5, 3, 0)
    for name, values in found[0][1].items():
        assert found[1][1][name] == pytest.approx(values, rel=1e-12), name
    assert found[0][0] == found[1][0]


def local(rank: Rank) -> Any:
    module = Normed("2d")
    plan = Plan(data=rank.world, precision="float64")
    replica = parallelize(module, plan, rank.mesh(plan), batch_norm="local")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    whole = batch_of(0, 8, "2d")
    mine = jobs.rows(whole, rank_slice(8, rank.world, rank.rank))
    step(replica, [optimizer], [jobs.Micro(mine, 0)], loss=squared)
    before = module.norm.running_mean.tolist()
    evaluate(replica, [mine], squared)
    return before, module.norm.running_mean.tolist()


def test_local_statistics_become_those_of_rank_0_at_evaluation() -> None:
    (before_0, after_0), (before_1, after_1) = run_ranks(2, local)
    assert before_0 != before_1
    assert before_0 == after_0 == after_1


def half(rank: Rank) -> list[float]:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    plan = Plan(data=rank.world, precision="bfloat16")
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for s in range(3):
        g = torch.Generator().manual_seed(s)
        x, y = torch.randn(8, 2, 5, 5, generator=g), torch.randint(0, 3, (8,), generator=g)
        mine = list(rank_slice(8, rank.world, rank.rank))

        def entropy(output: Tensor, batch: Any) -> tuple[Tensor, int]:
            return nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(output)

        losses.append(step(replica, [optimizer], [jobs.Micro((x[mine], y[mine]), s)], loss=entropy).loss)
    return losses


def test_under_bfloat16_autocast() -> None:
    one, two = run_ranks(1, half)[0], run_ranks(2, half)[0]
    assert two == pytest.approx(one, rel=2e-2)
