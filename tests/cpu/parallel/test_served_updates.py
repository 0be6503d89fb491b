"""Replicas whose parameters live on servers, against one process on the whole batch in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import NonFiniteLoss, SpecError
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan
from shardwise.spec.sync import Sync
from tests.cpu.parallel import jobs
from tests.cpu.parallel.test_batchnorm import Normed, batch_of, squared
from tests.cpu.parallel.test_coupling import Towers, contrastive
from tests.cpu.parallel.test_coupling import batch_of as pairs
from tests.ranks import Rank, RankFailed, run_ranks

STEPS = 7
SERVED = Sync(word="param_server", bucket_bytes=300)
IN_TURN = Sync(word="param_server", method="stale", bucket_bytes=300)  # bound 0: synchronous, through messages


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    named = dict(module.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    rest = [p for p in named.values() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda m: torch.optim.SGD(groups(m), lr=0.05, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(groups(m), lr=0.02, fused=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.05),
}


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{name}/{key}": value.flatten().tolist() if isinstance(value, Tensor) else value
        for name, p in module.named_parameters()
        for key, value in sorted(optimizer.state[p].items())
    }


def train(rank: Rank, sync: Sync, maker: str, samples: int, pieces: int, clip: float | None) -> dict[str, Any]:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = MAKERS[maker](module)
    held = [list(group["params"]) for group in optimizer.param_groups]
    results = [
        step(
            replica,
            [optimizer],
            jobs.share(s, samples, rank.rank, rank.world, pieces),
            loss=jobs.loss,
            clip_norm=clip,
        )
        for s in range(STEPS)
    ]
    with replica.synchroniser.consistent([optimizer]):
        agreed = state_of(module, optimizer)
        values = jobs.values(module)
    replica.synchroniser.settle([optimizer])
    assert all(
        mine is p
        for group, ps in zip(optimizer.param_groups, held, strict=True)
        for mine, p in zip(group["params"], ps, strict=True)
    )
    assert state_of(module, optimizer) == agreed
    assert jobs.values(module) == values
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters()), "memory of their own again"
    step(replica, [optimizer], jobs.share(0, samples, rank.rank, rank.world), loss=jobs.loss)  # goes on if it must
    replica.synchroniser.settle([optimizer])
    replica.close()
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "weights": [r.weight for r in results],
        "state": agreed,
        "values": values,
        "print": jobs.fingerprint(module),
    }


def alone(maker: str, samples: int, clip: float | None) -> tuple[list[float], dict[str, Any], list[list[float]]]:
    module = jobs.net().double()
    optimizer = MAKERS[maker](module)
    losses = jobs.one_process(module, optimizer, samples, STEPS, clip_norm=clip)
    return losses, state_of(module, optimizer), jobs.values(module)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-8, abs=1e-11), key


@pytest.mark.parametrize(
    ("ranks", "maker", "samples", "pieces", "clip"),
    [
        (2, "momentum", 8, 1, None),
        (2, "adamw", 8, 2, 0.3),
        (3, "adamw", 7, 1, None),
        (3, "momentum", 2, 1, 0.5),
        (2, "adafactor", 6, 1, 0.3),
    ],
)
def test_in_step_replicas_compute_what_one_process_computes(
    ranks: int, maker: str, samples: int, pieces: int, clip: float | None
) -> None:
    losses, state, values = alone(maker, samples, clip)
    found = run_ranks(ranks, train, SERVED, maker, samples, pieces, clip)
    for one in found:
        assert one["losses"] == pytest.approx(losses, rel=1e-9)
        assert one["print"] == found[0]["print"]
        assert one["norms"] == found[0]["norms"]
        same(one["state"], state)
        for mine, other in zip(one["values"], values, strict=True):
            assert mine == pytest.approx(other, rel=1e-8, abs=1e-11)


@pytest.mark.parametrize(("ranks", "maker", "pieces"), [(2, "adamw", 1), (3, "momentum", 2), (2, "adafactor", 1)])
def test_by_clocks_with_bound_0_replicas_compute_what_one_process_computes(ranks: int, maker: str, pieces: int) -> None:
    losses, state, values = alone(maker, 7, None)
    for one in run_ranks(ranks, train, IN_TURN, maker, 7, pieces, None):
        assert one["losses"][1:] == pytest.approx(losses[:-1], rel=1e-9), "the loss of the newest finished step"
        same(one["state"], state)
        for mine, other in zip(one["values"], values, strict=True):
            assert mine == pytest.approx(other, rel=1e-8, abs=1e-11)


class Branches(nn.Module):
    """One branch is used in even steps, one never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.often, self.never = (nn.Linear(jobs.FEATURES, jobs.OUTPUTS) for _ in range(3))
        self.step = 0

    def forward(self, input: Tensor) -> Tensor:
        found = self.always(input)
        return found + self.often(input) if self.step % 2 == 0 else found


def branches(rank: Rank, sync: Sync) -> Any:
    module = Branches()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for s in range(STEPS):
        module.step = s
        module.always.weight.requires_grad_(s != 3)  # frozen for a step, on all ranks
        step(replica, [optimizer], jobs.share(s, 6, rank.rank, rank.world), loss=jobs.loss)
    replica.synchroniser.settle([optimizer])
    return jobs.values(module), sorted(state_of(module, optimizer))


@pytest.mark.parametrize("sync", [SERVED, IN_TURN])
def test_what_nobody_used_is_left_alone(sync: Sync) -> None:
    module = Branches().double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for s in range(STEPS):
        module.step = s
        module.always.weight.requires_grad_(s != 3)
        batch = {k: v.double() for k, v in jobs.data(s, 6).items()}
        total, weight = jobs.loss(module(batch["input"]), batch)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    for values, kept in run_ranks(2, branches, sync):
        assert kept == sorted(state_of(module, optimizer))
        for mine, other in zip(values, jobs.values(module), strict=True):
            assert mine == pytest.approx(other, rel=1e-8, abs=1e-11)


def normed(rank: Rank, sync: Sync) -> Any:
    module = Normed("1d")
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for s in range(3):
        batch = jobs.rows(batch_of(s, 7, "1d"), range(0, 3) if rank.rank == 0 else range(3, 7))
        step(replica, [optimizer], [jobs.Micro(batch, 0)], loss=squared)
    replica.synchroniser.settle([optimizer])
    return jobs.values(module)


def test_batch_norms_over_ranks_go_with_servers_in_step() -> None:
    for one, other in zip(run_ranks(2, normed, SERVED), run_ranks(2, normed, Sync()), strict=True):
        for mine, expected in zip(one, other, strict=True):
            assert mine == pytest.approx(expected, rel=1e-8)


def coupled(rank: Rank, sync: Sync) -> Any:
    module = Towers().double()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan), coupled="gather")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for s in range(3):
        batch = jobs.rows(pairs(s), range(0, 4) if rank.rank == 0 else range(4, 8))
        losses.append(step(replica, [optimizer], [jobs.Micro(batch, 0)], loss=contrastive).loss)
    replica.synchroniser.settle([optimizer])
    return losses, jobs.values(module)


def test_coupled_losses_go_with_servers_in_step() -> None:
    for (losses, one), (expected, other) in zip(
        run_ranks(2, coupled, SERVED), run_ranks(2, coupled, Sync()), strict=True
    ):
        assert losses == pytest.approx(expected, rel=1e-9)
        for mine, theirs in zip(one, other, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8)


def overflowing(rank: Rank, sync: Sync) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float16", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    assert replica.scaler is not None
    replica.scaler.scale = 2.0**18
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    results = []
    for s in range(12):
        result = step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=jobs.loss)
        results.append((result.skipped, result.loss, replica.scaler.scale))
    replica.synchroniser.settle([optimizer])
    return results, jobs.values(module)


def test_float16_overflows_skip_steps_as_with_an_all_reduce() -> None:
    for (results, one), (expected, other) in zip(
        run_ranks(2, overflowing, SERVED), run_ranks(2, overflowing, Sync()), strict=True
    ):
        assert [(skipped, scale) for skipped, _, scale in results] == [(k, scale) for k, _, scale in expected]
        assert results[0][0]
        assert not results[-1][0]
        assert [loss for _, loss, _ in results] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)
        for mine, theirs in zip(one, other, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def poisoned(rank: Rank, sync: Sync, on_nan: Any) -> Any:
    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = jobs.loss(output, batch)
        return total * (math.nan if s == 2 and rank.rank == 1 else 1.0), weight

    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    prints = []
    for s in range(5):
        try:
            step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=loss, on_nan=on_nan)
        except NonFiniteLoss as error:
            replica.close()
            return str(error), prints
        prints.append(jobs.fingerprint(module))
    replica.synchroniser.settle([optimizer])
    return jobs.fingerprint(module), prints


def test_a_loss_that_is_not_finite_is_seen_on_all_ranks_in_step() -> None:
    for text, _ in run_ranks(2, poisoned, SERVED, "stop"):
        assert "nan on rank 1" in text
    (last, prints), (other, _) = run_ranks(2, poisoned, SERVED, "skip")
    assert last == other
    assert prints[2] == prints[1]
    assert prints[3] != prints[2]


@pytest.mark.parametrize("sync", [Sync(word="param_server", bound=2), Sync(word="param_server", method="async")])
def test_a_gradient_that_is_not_finite_is_not_pushed(sync: Sync) -> None:
    (last, _), (other, _) = run_ranks(2, poisoned, sync, "skip")
    assert last == other
    module_values = run_ranks(2, poisoned_values, sync)
    assert all(math.isfinite(x) for values in module_values for row in values for x in row)


def poisoned_values(rank: Rank, sync: Sync) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)

    def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = jobs.loss(output, batch)
        return total * (math.inf if rank.rank == 1 else 1.0), weight

    for s in range(5):
        step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=loss, on_nan="skip")
    replica.synchroniser.settle([optimizer])
    return jobs.values(module)


def ahead(rank: Rank, sync: Sync, steps: int) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.5)
    results = []
    for s in range(steps):
        # Who is left out as a straggler is chance: all ranks have the same samples, so that it makes no difference.
        micro = jobs.share(s % 5, 8, 0 if sync.backup else rank.rank, rank.world)
        results.append(step(replica, [optimizer], micro, loss=jobs.loss))
    with replica.synchroniser.consistent([optimizer]):
        one = jobs.fingerprint(module)
        state = state_of(module, optimizer)
    replica.synchroniser.settle([optimizer])
    told = replica.synchroniser.told()
    replica.close()
    reached = loss_on_all(module)
    return [r.loss for r in results], [r.skipped for r in results], one, state, told, jobs.fingerprint(module), reached


def loss_on_all(module: nn.Module) -> float:
    batches = [{k: v.double() for k, v in jobs.data(s, 8).items()} for s in range(5)]
    with torch.no_grad():
        pairs = [jobs.loss(module(batch["input"]), batch) for batch in batches]
    return float(sum(total for total, _ in pairs) / sum(weight for _, weight in pairs))


@pytest.mark.parametrize(
    "sync",
    [
        Sync(word="param_server", bound=3),
        Sync(word="param_server", method="async"),
        Sync(word="param_server", backup=1),
    ],
    ids=["stale", "async", "backup"],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_by_clocks_replicas_learn_and_agree_in_the_end(sync: Sync, ranks: int) -> None:
    found = run_ranks(ranks, ahead, sync, 60)
    module = jobs.net().double()
    begun = loss_on_all(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.5)
    for s in range(60):
        batch = {k: v.double() for k, v in jobs.data(s % 5, 8).items()}
        if sync.backup:
            batch = {k: v.double() for k, v in jobs.share(s % 5, 8, 0, ranks)[0].batch.items()}
        total, weight = jobs.loss(module(batch["input"]), batch)
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    whole = loss_on_all(module)
    for losses, _, one, state, told, last, reached in found:
        assert one == found[0][2]
        assert last == found[0][5] == one
        assert state == found[0][3]
        assert told is not None
        assert all(math.isfinite(loss) for loss in losses)
        assert begun - reached > 0.8 * (begun - whole), "it learned about as much as one process"
        if sync.backup:
            assert reached == pytest.approx(whole, rel=1e-9)  # one gradient or both, it is the same update
    if not sync.backup and ranks == 2:  # of three, one has batches that weigh nothing
        assert not any(any(skipped) for _, skipped, *_ in found)


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(30, 4, sparse=sparse)
        self.out = nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(self.table(input).sum(1))


def words(s: int, samples: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(s)
    return {
        "input": torch.randint(0, 30, (samples, 3), generator=g),
        "targets": torch.randn(samples, 2, generator=g, dtype=torch.float64),
        "counts": torch.ones(samples, dtype=torch.float64),
    }


def optimizers_of(module: Words, *, sparse: bool) -> list[torch.optim.Optimizer]:
    kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
    return [kind([module.table.weight], lr=0.05), torch.optim.AdamW(module.out.parameters(), lr=0.05)]


def table_state(module: Words, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    kept = optimizers[0].state[module.table.weight]
    return {key: value.flatten().tolist() if isinstance(value, Tensor) else value for key, value in kept.items()}


def lookups(rank: Rank, sync: Sync, pieces: int) -> Any:
    warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
    module = Words(sparse=True).double()
    plan = Plan(data=rank.world, sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizers = optimizers_of(module, sparse=True)
    for s in range(STEPS):
        batch = words(s, 6)
        mine = range(rank.rank * 6 // rank.world, (rank.rank + 1) * 6 // rank.world)
        half = len(mine) // 2
        parts = [mine] if pieces == 1 else [mine[:half], mine[half:]]
        micro = [jobs.Micro(jobs.rows(batch, part), 0) for part in parts]
        step(replica, optimizers, micro, loss=jobs.loss)
    with replica.synchroniser.consistent(optimizers):
        state = table_state(module, optimizers)
    replica.synchroniser.settle(optimizers)
    return jobs.values(module), state


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize(("sync", "ranks", "pieces"), [(SERVED, 2, 1), (SERVED, 3, 2), (IN_TURN, 2, 2)])
def test_rows_of_embeddings_are_updated_as_in_one_process(sync: Sync, ranks: int, pieces: int) -> None:
    module = Words(sparse=True).double()
    optimizers = optimizers_of(module, sparse=True)
    for s in range(STEPS):
        batch = words(s, 6)
        total, weight = jobs.loss(module(batch["input"]), batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (total / weight).backward()
        for optimizer in optimizers:
            optimizer.step()
    expected = table_state(module, optimizers)
    for values, state in run_ranks(ranks, lookups, sync, pieces):
        for mine, other in zip(values, jobs.values(module), strict=True):
            assert mine == pytest.approx(other, rel=1e-7, abs=1e-10)
        same(state, expected)


def refused(rank: Rank) -> list[str]:
    texts = []
    stale = Plan(data=rank.world, sync=Sync(word="param_server", bound=1))
    mesh = rank.mesh(stale)

    def attempt(call: Callable[[], Any]) -> None:
        with pytest.raises(SpecError) as caught:
            call()
        texts.append(str(caught.value))

    attempt(lambda: parallelize(Normed("1d"), stale, mesh))
    attempt(lambda: parallelize(jobs.net(), stale, mesh, coupled="gather"))
    attempt(lambda: parallelize(jobs.net(), Plan(data=rank.world, exact=True, sync=SERVED), mesh))
    attempt(lambda: parallelize(jobs.net(), Plan(data=rank.world, precision="float16", sync=stale.sync), mesh))
    module = jobs.net()
    replica: Replica = parallelize(module, stale, mesh)
    micro = jobs.share(0, 8, rank.rank, rank.world)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    attempt(lambda: step(replica, [sgd], micro, loss=jobs.loss, clip_norm=1.0))
    lbfgs = torch.optim.LBFGS(module.parameters())
    attempt(lambda: step(replica, [lbfgs], micro, loss=jobs.loss))
    return texts


def test_what_a_mode_cannot_do_is_refused_by_name() -> None:
    for texts in run_ranks(2, refused):
        for text, said in zip(
            texts, ["batch_norm", "coupled", "exact", "float16", "clip_norm=1.0", "LBFGS"], strict=True
        ):
            assert said in text


def dies(rank: Rank, sync: Sync) -> None:
    module = jobs.net()
    plan = Plan(data=rank.world, sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))

    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise ZeroDivisionError("it divides by zero")

    optimizer = Breaks(module.parameters(), lr=0.1)
    for s in range(50):
        step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=jobs.loss)


@pytest.mark.parametrize("sync", [SERVED, Sync(word="param_server", bound=1)])
def test_an_optimizer_that_fails_says_so(sync: Sync) -> None:
    with pytest.raises(RankFailed, match="it divides by zero"):
        run_ranks(2, dies, sync)
