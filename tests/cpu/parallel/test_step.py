"""`step` on several ranks against one process on the whole batch."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import JobError, NonFiniteLoss
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.step import evaluate, step
from shardwise.spec.plan import Plan
from shardwise.spec.sync import Sync
from tests.cpu.parallel import jobs
from tests.ranks import Rank, run_ranks

SAMPLES, STEPS = 7, 4


def replica_of(
    rank: Rank, module: nn.Module, *, batch_norm: Any = "sync", coupled: Any = "refuse", **plan: Any
) -> Replica:
    shaped = Plan(data=rank.world, **plan)
    return parallelize(module, shaped, rank.mesh(shaped), batch_norm=batch_norm, coupled=coupled)


def train(rank: Rank, pieces: int, clip_norm: float | None, bucket_bytes: int, samples: int = SAMPLES) -> Any:
    module = jobs.net()
    replica = replica_of(rank, module, precision="float64", sync=Sync(bucket_bytes=bucket_bytes))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    results = [
        step(
            replica,
            [optimizer],
            jobs.share(s, samples, rank.rank, rank.world, pieces),
            loss=jobs.loss,
            clip_norm=clip_norm,
        )
        for s in range(STEPS)
    ]
    assert all(map(jobs.times_are_sane, results))
    assert all(p.grad is None for p in module.parameters())
    return [r.loss for r in results], [r.weight for r in results], [r.grad_norm for r in results], jobs.values(module)


def oracle(clip_norm: float | None, samples: int = SAMPLES) -> tuple[list[float], list[list[float]]]:
    module = jobs.net().double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = jobs.one_process(module, optimizer, samples, STEPS, clip_norm=clip_norm)
    return losses, jobs.values(module)


@pytest.mark.parametrize(
    ("n", "pieces", "clip_norm", "bucket_bytes"),
    [(1, 1, None, 1), (1, 3, 0.5, 1), (2, 1, None, 25_000_000), (2, 2, 0.5, 300), (3, 2, 0.1, 1), (4, 1, None, 600)],
)
def test_ranks_compute_what_one_process_computes(
    n: int, pieces: int, clip_norm: float | None, bucket_bytes: int
) -> None:
    losses, weights = oracle(clip_norm)
    found = run_ranks(n, train, pieces, clip_norm, bucket_bytes)
    for rank in found:
        assert rank[0] == pytest.approx(losses, rel=1e-12)
        assert rank[1] == [float(jobs.data(s, SAMPLES)["counts"].sum()) for s in range(STEPS)]
        assert rank[:3] == found[0][:3]
        assert rank[3] == found[0][3]
        for mine, expected in zip(rank[3], weights, strict=True):
            assert mine == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_reported_norm_is_that_before_clipping() -> None:
    module = jobs.net().double()
    batch = {k: v.double() for k, v in jobs.data(0, SAMPLES).items()}
    total, weight = jobs.loss(module(batch["input"]), batch)
    (total / weight).backward()
    expected = float(nn.utils.clip_grad_norm_(module.parameters(), 1.0))
    for clip_norm in (None, 0.1):
        found = run_ranks(2, train, 1, clip_norm, 300)
        assert found[0][2][0] == pytest.approx(expected, rel=1e-12)


def test_a_rank_without_samples_ends_with_the_same_parameters() -> None:
    losses, weights = oracle(None, samples=2)
    found = run_ranks(3, train, 1, None, 300, 2)
    assert found[2][0] == pytest.approx(losses, rel=1e-12)
    assert found[0][3] == found[1][3] == found[2][3]
    for mine, expected in zip(found[2][3], weights, strict=True):
        assert mine == pytest.approx(expected, rel=1e-9, abs=1e-12)


def replicas_start_alike(rank: Rank) -> str:
    torch.manual_seed(rank.rank)
    module = nn.Linear(3, 2)
    before = module.weight
    replica = replica_of(rank, module)
    assert replica.module is module
    assert module.weight is before
    return jobs.fingerprint(module)


def test_replicas_start_from_the_values_of_rank_0() -> None:
    torch.manual_seed(0)
    assert run_ranks(3, replicas_start_alike) == [jobs.fingerprint(nn.Linear(3, 2))] * 3


def against_ddp(rank: Rank) -> tuple[list[list[float]], list[list[float]]]:
    """Both see unit weights, for which a mean of means is the mean."""
    ours, theirs = jobs.net(), jobs.net()
    replica = replica_of(rank, ours)
    wrapped = nn.parallel.DistributedDataParallel(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs)]

    def plain(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return (output - batch["targets"]).square().sum(), len(output)

    for s in range(5):
        micro = jobs.share(s, 8, rank.rank, rank.world)
        step(replica, optimizers[:1], micro, loss=plain)
        batch = micro[0].batch
        optimizers[1].zero_grad()
        (plain(wrapped(batch["input"]), batch)[0] / len(batch["input"])).backward()
        optimizers[1].step()
    return jobs.values(ours), jobs.values(theirs)


def test_the_reducer_agrees_with_distributed_data_parallel() -> None:
    for ours, theirs in run_ranks(2, against_ddp):
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(expected, rel=1e-5, abs=1e-6)


# Loss and gradients that are not finite.


def poisoned(rank: Rank, on_nan: str, where: str) -> tuple[str, bool, bool, bool]:
    module = jobs.net()
    replica = replica_of(rank, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    step(replica, [optimizer], jobs.share(0, SAMPLES, rank.rank, rank.world), loss=jobs.loss)
    before, moments = jobs.fingerprint(module), str(optimizer.state_dict())

    def bad(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = jobs.loss(output, batch)
        if rank.rank != rank.world - 1:
            return total, weight
        if where == "loss":
            return total * float("nan"), weight
        return total + (output * 0).sum().sqrt(), weight  # the root of 0 has an infinite slope

    text, skipped = "", False
    try:
        result = step(replica, [optimizer], jobs.share(1, SAMPLES, rank.rank, rank.world), loss=bad, on_nan=on_nan)  # type: ignore[arg-type]
        skipped = result.skipped
    except NonFiniteLoss as error:
        text = str(error)
    same = jobs.fingerprint(module) == before and str(optimizer.state_dict()) == moments
    after = step(replica, [optimizer], jobs.share(2, SAMPLES, rank.rank, rank.world), loss=jobs.loss)
    return text, skipped, same, math.isfinite(after.loss)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("n", [1, 2])
def test_nan_stops_every_rank_before_a_parameter_changes(n: int, where: str) -> None:
    for text, _, same, goes_on in run_ranks(n, poisoned, "stop", where):
        assert ("the loss is nan on rank" if where == "loss" else "a gradient is nan or infinite") in text
        assert where != "loss" or f"rank {n - 1}" in text
        assert same
        assert goes_on


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_can_be_skipped(where: str) -> None:
    for text, skipped, same, goes_on in run_ranks(2, poisoned, "skip", where):
        assert text == ""
        assert skipped
        assert same
        assert goes_on


def weightless(rank: Rank) -> tuple[float, float, bool, bool]:
    module = jobs.net()
    replica = replica_of(rank, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    before = jobs.fingerprint(module)
    micro = [
        one._replace(batch={**one.batch, "counts": one.batch["counts"] * 0})
        for one in jobs.share(0, 4, rank.rank, rank.world)
    ]
    result = step(replica, [optimizer], micro, loss=jobs.loss)
    return result.loss, result.weight, result.skipped, jobs.fingerprint(module) == before


def test_a_step_that_counts_nothing_changes_nothing() -> None:
    assert run_ranks(2, weightless) == [(0.0, 0.0, True, True)] * 2


# Parameters that come and go.


class Branches(nn.Module):
    """`left` is used on rank 0 only, `never` nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(jobs.FEATURES, 8)
        self.left = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, jobs.OUTPUTS)
        self.turn_left = True

    def forward(self, input: Tensor) -> Tensor:
        x = self.trunk(input)
        return self.head(self.left(x) if self.turn_left else x)


def branching(rank: Rank, exact: bool) -> Any:
    module = Branches()
    replica = replica_of(rank, module, exact=exact, sync=Sync(bucket_bytes=400))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    start = module.never.weight.clone()
    for s in range(3):
        micro = jobs.exact_share(s, 8, rank.rank, rank.world, 4) if exact else jobs.share(s, 8, rank.rank, rank.world)
        module.turn_left = rank.rank == 0
        step(replica, [optimizer], micro, loss=jobs.loss)
    return jobs.fingerprint(module), torch.equal(start, module.never.weight), len(optimizer.state)


@pytest.mark.parametrize("exact", [False, True])
def test_unused_parameters_are_summed_where_used_and_left_alone_where_not(exact: bool) -> None:
    found = run_ranks(2, branching, exact)
    assert found[0] == found[1]
    for _, untouched, states in found:
        assert untouched
        assert states == 6


def late_freezing(rank: Rank) -> Any:
    module = jobs.net()
    first, last = module[0], module[3]
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    replica = replica_of(rank, module, precision="float64")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(6):
        if s == 2:
            first.requires_grad_(True)
        if s == 4:
            last.requires_grad_(False)
        step(replica, [optimizer], jobs.share(s, SAMPLES, rank.rank, rank.world), loss=jobs.loss)
    return jobs.values(module)


def test_parameters_may_be_frozen_and_thawed_between_steps() -> None:
    module = jobs.net().double()
    module[0].requires_grad_(False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(6):
        if s == 2:
            module[0].requires_grad_(True)
        if s == 4:
            module[3].requires_grad_(False)
        batch = {k: v.double() for k, v in jobs.data(s, SAMPLES).items()}
        total, weight = jobs.loss(module(batch["input"]), batch)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    for found in run_ranks(2, late_freezing):
        for mine, expected in zip(found, jobs.values(module), strict=True):
            assert mine == pytest.approx(expected, rel=1e-9, abs=1e-12)


def shared_and_mixed(rank: Rank) -> tuple[str, list[list[float]]]:
    """Tied weights, a channels-last parameter and two dtypes in one module."""
    torch.manual_seed(3)
    module = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last),
            "up": nn.Linear(4, 4),
            "down": nn.Linear(4, 4),
            "last": nn.Linear(4, 3, dtype=torch.bfloat16),
        }
    )
    module["down"].weight = module["up"].weight

    def forward(m: Any, batch: dict[str, Tensor]) -> Tensor:
        x = m["conv"](batch["image"]).mean((2, 3))
        return m["last"](m["down"](m["up"](x).tanh()).bfloat16())

    def squared(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        return output.float().square().sum(), len(output)

    replica = replica_of(rank, module, sync=Sync(bucket_bytes=200))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for s in range(3):
        g = torch.Generator().manual_seed(s)
        image = torch.randn(4, 2, 5, 5, generator=g).to(memory_format=torch.channels_last)
        mine = image[rank.rank * (4 // rank.world) :][: 4 // rank.world]
        step(replica, [optimizer], [jobs.Micro({"image": mine}, s)], loss=squared, forward=forward)
    return jobs.fingerprint(module), jobs.values(module)


def test_tied_strided_and_mixed_parameters() -> None:
    one, two = run_ranks(1, shared_and_mixed), run_ranks(2, shared_and_mixed)
    assert two[0][0] == two[1][0]
    for mine, expected in zip(two[0][1], one[0][1], strict=True):
        assert mine == pytest.approx(expected, rel=2e-2, abs=2e-3)


# Several optimizers, evaluation, own loops, state.


def evaluated(rank: Rank, batches: list[int]) -> dict[str, float]:
    module = jobs.net()
    replica = replica_of(rank, module)
    mine = [jobs.data(s, 3 + s) for s in range(batches[rank.rank] if rank.rank < len(batches) else 0)]
    first = sum(batches[: rank.rank])
    mine = [jobs.data(first + i, 3 + first + i) for i in range(batches[rank.rank])]
    module.train()
    found = evaluate(replica, mine, jobs.loss, {"largest": lambda output, batch: (output.abs().max(), 1)})
    assert module.training
    return found


def test_evaluation_counts_every_sample_once_over_uneven_ranks() -> None:
    (alone,) = run_ranks(1, evaluated, [5])
    found = run_ranks(3, evaluated, [2, 0, 3])
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(alone, rel=1e-6)
    assert set(alone) == {"loss", "largest"}


def own_loop(rank: Rank, accumulate: bool) -> Any:
    module = jobs.net().double()
    replica = replica_of(rank, module, sync=Sync(bucket_bytes=300))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(4):
        batch = {k: v.double() for k, v in jobs.share(s, 8, rank.rank, rank.world)[0].batch.items()}
        optimizer.zero_grad()
        if accumulate:
            with replica.no_sync():
                ((module(batch["input"]) - batch["targets"]).square().mean() * 0.5).backward()
        ((module(batch["input"]) - batch["targets"]).square().mean() * (0.5 if accumulate else 1.0)).backward()
        replica.synchronise()
        optimizer.step()
    replica.close()
    module(batch["input"]).sum().backward()
    return jobs.values(module)


@pytest.mark.parametrize("accumulate", [False, True])
def test_own_loops_get_the_mean_gradient(accumulate: bool) -> None:
    module = jobs.net().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(4):
        batch = {k: v.double() for k, v in jobs.data(s, 8).items()}
        optimizer.zero_grad()
        (module(batch["input"]) - batch["targets"]).square().mean().backward()
        optimizer.step()
    for found in run_ranks(2, own_loop, accumulate):
        for mine, expected in zip(found, jobs.values(module), strict=True):
            assert mine == pytest.approx(expected, rel=1e-9, abs=1e-12)


def interrupted(rank: Rank, stop: int | None) -> tuple[list[float], str]:
    module = jobs.net()
    replica = replica_of(rank, module, exact=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for s in range(6):
        if s == stop:
            saved, weights, moments = replica.state(), module.state_dict(), optimizer.state_dict()
            replica.close()
            module = jobs.net()
            module.load_state_dict(weights)
            replica = parallelize(module, replica.plan, replica.mesh)
            replica.load_state(saved)
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
            optimizer.load_state_dict(moments)
        losses.append(
            step(replica, [optimizer], jobs.exact_share(s, SAMPLES, rank.rank, rank.world, 4), loss=jobs.loss).loss
        )
    return losses, jobs.fingerprint(module)


def test_the_replicas_state_makes_the_next_step_the_same() -> None:
    assert run_ranks(2, interrupted, 3) == run_ranks(2, interrupted, None)


def mended(rank: Rank, fails: bool) -> str:
    """In a notebook a failed step is mended and run again."""
    module = jobs.net()
    replica = replica_of(rank, module, exact=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    micro = jobs.exact_share(0, 8, rank.rank, rank.world, 4)

    def wrong(output: Tensor, batch: Any) -> Any:
        if batch is micro[2].batch:
            raise ValueError("not yet")
        return jobs.loss(output, batch)

    if fails:
        with pytest.raises(JobError, match="not yet"):
            step(replica, [optimizer], micro, loss=wrong)
    step(replica, [optimizer], micro, loss=jobs.loss)
    return jobs.fingerprint(module)


def test_a_step_after_one_that_failed_is_as_if_it_had_not_been() -> None:
    assert run_ranks(1, mended, True) == run_ranks(1, mended, False)


def two_optimizers(rank: Rank) -> Any:
    module = jobs.net()
    replica = replica_of(rank, module)
    optimizers = [torch.optim.SGD(module[0].parameters(), lr=0.1), torch.optim.AdamW(module[3].parameters(), lr=1e-2)]
    start = jobs.values(module)
    step(replica, optimizers, jobs.share(0, 4, rank.rank, rank.world), loss=jobs.loss)
    return [a != b for a, b in zip(start, jobs.values(module), strict=True)]


def test_every_optimizer_of_a_job_steps() -> None:
    assert run_ranks(2, two_optimizers) == [[True] * 4] * 2


def compiled(rank: Rank) -> Any:
    torch._dynamo.reset()
    module = jobs.net()
    plan = Plan(data=rank.world)
    module.compile(backend="eager")
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(3):
        step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=jobs.loss)
    return jobs.values(module)


def plain(rank: Rank) -> Any:
    module = jobs.net()
    replica = replica_of(rank, module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(3):
        step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=jobs.loss)
    return jobs.values(module)


def test_hooks_work_under_a_compiled_forward() -> None:
    for mine, expected in zip(run_ranks(2, compiled)[0], run_ranks(2, plain)[0], strict=True):
        assert mine == pytest.approx(expected, rel=1e-5, abs=1e-6)


def inductor(rank: Rank) -> float:
    warnings.simplefilter("ignore")  # torch's compiler calls what torch has deprecated
    module = jobs.net()
    plan = Plan(data=rank.world)
    replica = parallelize(module, plan, rank.mesh(plan), compile=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=jobs.loss).loss for s in range(3)][
        -1
    ]


@pytest.mark.slow
def test_inductor_by_choice() -> None:
    module = jobs.net()
    losses = jobs.one_process(module, torch.optim.SGD(module.parameters(), lr=0.1), 8, 3, wide=False)
    assert run_ranks(2, inductor, timeout_s=300) == pytest.approx([losses[-1]] * 2, rel=1e-4)
