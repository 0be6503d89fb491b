"""Losses that couple samples: found, refused by name, or gathered and then equal to one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from shardwise import events
from shardwise.data.order import rank_slice, shard_slices, shards_of
from shardwise.parallel.evaluate import evaluate
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan, Precision
from tests.cpu.parallel import jobs
from tests.ranks import Rank, RankFailed, run_ranks

SAMPLES, STEPS = 10, 4


class Pair(NamedTuple):
    """What two towers give."""

    images: Tensor
    texts: Tensor
    temperature: Tensor


class Towers(nn.Module):
    """Two encoders and a learned temperature, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.image = nn.Linear(6, 4)
        self.text = nn.Linear(5, 4)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor, text: Tensor) -> Pair:
        return Pair(self.image(image), self.text(text), self.temperature * 2)


def contrastive(output: Pair, batch: Any) -> tuple[Tensor, int]:
    """Radford et al. 2021, figure 3."""
    logits = nn.functional.normalize(output.images, dim=-1) @ nn.functional.normalize(output.texts, dim=-1).T
    logits = logits * output.temperature.exp()
    target = torch.arange(len(logits))
    both = nn.functional.cross_entropy(logits, target, reduction="sum") + nn.functional.cross_entropy(
        logits.T, target, reduction="sum"
    )
    return both / 2, len(logits)


def batch_of(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    shape = {"image": (SAMPLES, 6), "text": (SAMPLES, 5)}
    return {name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in shape.items()}


def train(
    rank: Rank, coupled: Any, pieces: int, exact: bool, samples: int = SAMPLES, precision: Precision = "float64"
) -> Any:
    module = Towers()
    plan = Plan(data=rank.world, precision=precision, exact=exact)
    replica = parallelize(module, plan, rank.mesh(plan), coupled=coupled)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    results = []
    for s in range(STEPS):
        whole = {
            k: v[:samples].to(torch.float64 if precision == "float64" else torch.float32)
            for k, v in batch_of(s).items()
        }
        if exact:
            slices = shard_slices(samples, 4)
            micro = [jobs.Micro(jobs.rows(whole, slices[i]), s, i) for i in shards_of(rank.rank, rank.world, 4)]
        else:
            mine = list(rank_slice(samples, rank.world, rank.rank))
            size = -(-len(mine) // pieces) if mine else 1
            micro = [jobs.Micro(jobs.rows(whole, mine[i : i + size]), s) for i in range(0, len(mine), size)]
        results.append(step(replica, [optimizer], micro, loss=contrastive))
    return [r.loss.hex() for r in results], [r.weight for r in results], jobs.values(module), jobs.fingerprint(module)


def oracle(samples: int = SAMPLES) -> tuple[list[float], list[list[float]]]:
    module = Towers().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for s in range(STEPS):
        batch = {k: v[:samples] for k, v in batch_of(s).items()}
        total, weight = contrastive(module(**batch), batch)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append((total / weight).item())
    return losses, jobs.values(module)


@pytest.mark.parametrize(("n", "pieces", "samples"), [(1, 3, SAMPLES), (2, 1, SAMPLES), (3, 2, SAMPLES), (3, 1, 2)])
def test_gathered_losses_are_those_of_one_process(n: int, pieces: int, samples: int) -> None:
    losses, weights = oracle(samples)
    for found in run_ranks(n, train, "gather", pieces, False, samples):
        assert [float.fromhex(loss) for loss in found[0]] == pytest.approx(losses, rel=1e-9)
        assert found[1] == [float(samples)] * STEPS
        for mine, expected in zip(found[2], weights, strict=True):
            assert mine == pytest.approx(expected, rel=1e-8, abs=1e-11)


def held_out(rank: Rank, rounds: int) -> dict[str, float]:
    plan = Plan(data=rank.world, precision="float64")
    replica = parallelize(Towers(), plan, rank.mesh(plan), coupled="gather")
    mine = []
    for s in range(rounds):
        samples = SAMPLES if s == 0 else 1  # in the last round only rank 0 has a sample
        rows = list(rank_slice(samples, rank.world, rank.rank))
        if rows:
            mine.append(jobs.rows({k: v[:samples] for k, v in batch_of(s).items()}, rows))
    return evaluate(replica, mine, contrastive, {"pairs": lambda output, batch: (len(output.images) ** 2, 1)})


@pytest.mark.parametrize("rounds", [1, 2])
def test_evaluation_gathers_what_training_gathers(rounds: int) -> None:
    alone = run_ranks(1, held_out, rounds)[0]
    assert alone["pairs"] == (SAMPLES**2 if rounds == 1 else (SAMPLES**2 + 1) / 2)
    for n in (2, 3):
        for found in run_ranks(n, held_out, rounds):
            assert found == pytest.approx(alone, rel=1e-12)


def test_gathered_losses_may_be_exact() -> None:
    alone = run_ranks(1, train, "gather", 1, True, SAMPLES, "float32")[0]
    for n in (2, 3, 4):
        assert run_ranks(n, train, "gather", 1, True, SAMPLES, "float32") == [alone] * n


@pytest.mark.parametrize(("n", "pieces", "exact"), [(2, 1, False), (1, 2, False)])
def test_a_coupled_loss_is_refused_by_name(n: int, pieces: int, exact: bool) -> None:
    with pytest.raises(RankFailed, match=r"JobError: loss \(contrastive\).*coupled='gather'"):
        run_ranks(n, train, "refuse", pieces, exact)


def test_one_rank_with_the_whole_batch_needs_no_word() -> None:
    losses, _ = oracle()
    (found,) = run_ranks(1, train, "refuse", 1, False)
    assert [float.fromhex(loss) for loss in found[0]] == pytest.approx(losses, rel=1e-9)


def mean_loss(rank: Rank) -> None:
    module = jobs.net()
    plan = Plan(data=rank.world)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def average(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        return (output - batch["targets"]).square().mean(), 1

    step(replica, [optimizer], jobs.share(0, 8, rank.rank, rank.world), loss=average)


def test_a_mean_instead_of_a_sum_is_told_what_to_return() -> None:
    with pytest.raises(RankFailed, match=r"average\) of a whole batch.*instead of a mean"):
        run_ranks(2, mean_loss)


def lonely(rank: Rank) -> list[str]:
    module = jobs.net()
    plan = Plan(data=rank.world)
    replica = parallelize(module, plan, rank.mesh(plan))
    said: list[events.Event] = []
    with events.sink(said.append):
        step(
            replica,
            [torch.optim.SGD(module.parameters(), lr=0.1)],
            jobs.share(0, 2, rank.rank, rank.world),
            loss=jobs.loss,
        )
    return [str(e["message"]) for e in said if e["event"] == "warning"]


def test_what_cannot_be_checked_is_said_once() -> None:
    first, second = run_ranks(2, lonely)
    assert len(first) == 1
    assert "could not check that loss (loss)" in first[0]
    assert second == []


def undisturbed(rank: Rank, fresh: bool) -> str:
    """The check draws no random numbers from the step's stream."""
    module = jobs.net(dropout=0.5)
    plan = Plan(data=rank.world)
    replica = parallelize(module, plan, rank.mesh(plan))
    replica.fresh = fresh
    replica.load_state({"guess": 4.0})

    def noisy(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return jobs.loss(output + torch.randn_like(output), batch)

    step(replica, [torch.optim.SGD(module.parameters(), lr=0.1)], jobs.share(0, 8, rank.rank, rank.world), loss=noisy)
    return jobs.fingerprint(module)


def test_the_check_leaves_the_random_stream_alone() -> None:
    assert run_ranks(2, undisturbed, True) == run_ranks(2, undisturbed, False)
