"""Exact mode: losses and parameters are bit for bit the same on any number of ranks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.comm.collectives import TreeSum
from shardwise.comm.tree import Node, nodes, owners, span, tree_sum
from shardwise.data.order import shards_of
from shardwise.errors import SpecError
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan, Precision
from shardwise.spec.sync import Sync
from tests.cpu.parallel import jobs
from tests.ranks import Rank, RankFailed, run_ranks


class Odd(nn.Module):
    """Dropout, a layer that some shards skip by chance, buffers that training changes, sizes that no vector divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(jobs.FEATURES, 13)
        self.norm = nn.BatchNorm1d(13)
        self.sometimes = nn.Linear(13, 13)
        self.last = nn.Linear(13, jobs.OUTPUTS)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input)
        if len(input) > 1:
            x = self.norm(x)
        x = self.drop(x.tanh())
        if random.random() < 0.5:
            x = self.sometimes(x) * (1 + self.seen / 100)
        with torch.no_grad():
            self.seen += input.abs().mean()
        return self.last(x)


def train(
    rank: Rank, precision: Precision, shards: int, samples: int, bucket_bytes: int
) -> tuple[list[str], str, list[str]]:
    plan = Plan(data=rank.world, exact=True, precision=precision, sync=Sync(bucket_bytes=bucket_bytes))
    module = Odd()
    replica = parallelize(module, plan, rank.mesh(plan), batch_norm="local", logical_shards=shards)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses, norms = [], []
    for s in range(6):
        micro = jobs.exact_share(s, samples, rank.rank, rank.world, shards)
        result = step(replica, [optimizer], micro, loss=jobs.loss, clip_norm=0.5)
        losses.append(result.loss.hex())
        norms.append(float(result.grad_norm or 0.0).hex())
    assert torch.get_num_threads() == 1
    return losses, jobs.fingerprint(module), norms


@pytest.mark.parametrize(
    ("precision", "shards", "samples", "bucket_bytes"),
    [
        ("float32", 4, 13, 25_000_000),
        ("bfloat16", 4, 9, 300),
        ("float32", 8, 5, 700),
        ("float32", 5, 23, 1),
        ("float64", 3, 7, 400),
    ],
)
def test_any_number_of_ranks_gives_the_same_bits(
    precision: Precision, shards: int, samples: int, bucket_bytes: int
) -> None:
    alone = run_ranks(1, train, precision, shards, samples, 25_000_000)[0]
    assert len(set(alone[0])) == len(alone[0])
    for n in (2, 3, 4):
        for found in run_ranks(n, train, precision, shards, samples, bucket_bytes):
            assert found == alone


def plain_sum_differs(rank: Rank) -> str:
    """The same shards as microbatches without exact: the order of the sums shows in the bits."""
    plan = Plan(data=rank.world)
    module = jobs.net()
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for s in range(6):
        step(replica, [optimizer], jobs.exact_share(s, 13, rank.rank, rank.world, 4), loss=jobs.loss)
    return jobs.fingerprint(module)


def test_without_exact_the_number_of_ranks_shows() -> None:
    assert run_ranks(1, plain_sum_differs)[0] != run_ranks(3, plain_sum_differs)[0]


def tree_sums(rank: Rank, total: int, length: int) -> list[float]:
    group = rank.mesh().axis("data").group
    assert group is not None
    values = [torch.randn(length, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in range(total)]
    mine = [sum_of(values, node, total) for node in nodes(*span(rank.rank, rank.world, total), total)]
    found: list[float] = TreeSum(group, total).start(mine or [torch.zeros(length)]).wait().tolist()
    return found


def sum_of(values: list[Tensor], node: Node, total: int) -> Tensor:
    if node.stop - node.start == 1:
        return values[node.start].clone()
    width = 1
    while node.start + 2 * width < node.stop:
        width *= 2
    middle = node.start + width
    return sum_of(values, Node(node.start, middle), total) + sum_of(values, Node(middle, node.stop), total)


@pytest.mark.parametrize(("n", "total", "length"), [(2, 2, 5), (2, 6, 7), (3, 4, 1), (4, 3, 10), (3, 8, 2)])
def test_the_sum_over_ranks_is_that_of_the_tree(n: int, total: int, length: int) -> None:
    values = [torch.randn(length, generator=torch.Generator().manual_seed(i)) * 10.0**i for i in range(total)]
    leaves = [(Node(i, i + 1), v) for i, v in enumerate(values)]
    expected = tree_sum(leaves, total, torch.add).tolist()
    assert run_ranks(n, tree_sums, total, length) == [expected] * n


def test_ranks_own_the_shards_that_the_loader_gives_them() -> None:
    for ranks in range(1, 7):
        for total in range(1, 20):
            for rank in range(ranks):
                assert range(*span(rank, ranks, total)) == shards_of(rank, ranks, total)
            assert sum(len(found) for found in owners(ranks, total).values()) >= 1


def synchronised(rank: Rank) -> Any:
    plan = Plan(data=rank.world, exact=True)
    return parallelize(Odd(), plan, rank.mesh(plan), batch_norm="sync")


def test_exact_and_synchronised_batch_norms_exclude_each_other() -> None:
    plan = Plan(exact=True)
    with pytest.raises(RankFailed, match=r"exact=True cannot synchronise batch norms \(norm\)"):
        run_ranks(1, synchronised)
    assert issubclass(SpecError, Exception)
    assert plan.exact
