"""Replicas that step on their own and meet from time to time, against a simulation of them in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.errors import SpecError
from shardwise.parallel.moments import bounded_moments, carry_over, groups_with_moments
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.parallel.synchronise import KeptByAll
from shardwise.spec.plan import Plan
from shardwise.spec.sync import Sync
from tests.cpu.parallel import jobs
from tests.ranks import Rank, run_ranks

SAMPLES, STEPS = 8, 13


Betas = tuple[float, float]


def optimizer_of(module: nn.Module, betas: Betas | None) -> torch.optim.Optimizer:
    if betas is None:
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(module.parameters(), lr=0.01, betas=betas)


def train(rank: Rank, sync: Sync, steps: int = STEPS, betas: Betas | None = None) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = optimizer_of(module, betas)
    apart = []
    for s in range(steps):
        step(replica, [optimizer], jobs.share(s, SAMPLES, rank.rank, rank.world, 1), loss=jobs.loss)
        apart.append(jobs.values(module))
    with replica.synchroniser.consistent([optimizer]):
        agreed = jobs.values(module)
    after = jobs.values(module)
    replica.synchroniser.settle([optimizer])
    assert betas is None or optimizer.param_groups[0]["betas"] == betas  # as the job has them
    return apart, agreed, after, jobs.values(module)


def own_step(module: nn.Module, optimizer: torch.optim.Optimizer, s: int, rank: int, ranks: int) -> None:
    """A step on this rank's own share, by its own weight."""
    (micro,) = jobs.share(s, SAMPLES, rank, ranks, 1)
    batch = {key: value.double() for key, value in micro.batch.items()}
    total, weight = jobs.loss(module(batch["input"]), batch)
    if not weight:
        return  # nothing was counted: no step
    optimizer.zero_grad()
    (total / weight).backward()
    optimizer.step()


def simulate(
    ranks: int, sync: Sync, steps: int = STEPS, betas: Betas | None = None
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """The same in one process, in float64: the replicas' parameters after each step, and their mean at the end."""
    whole = jobs.net().double()
    modules = [copy.deepcopy(whole) for _ in range(ranks)]
    optimizers = [optimizer_of(m, betas) for m in modules]
    meeting = [p.detach().clone() for p in whole.parameters()]
    outer = torch.optim.SGD(
        [nn.Parameter(m) for m in meeting], lr=sync.outer_lr, momentum=sync.outer_momentum, nesterov=True
    )
    history = []
    for s in range(steps):
        for rank, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            own_step(module, optimizer, s, rank, ranks)
        if (s + 1) % sync.every == 0:
            columns = list(zip(*[list(m.parameters()) for m in modules], strict=True))
            if sync.method == "sgd":
                points = [torch.stack([p.detach() for p in column]).mean(0) for column in columns]
            else:
                shared = outer.param_groups[0]["params"]
                for point, column in zip(shared, columns, strict=True):
                    point.grad = torch.stack([point.detach() - p.detach() for p in column]).mean(0)
                outer.step()
                points = [point.detach() for point in shared]
            for point, column in zip(points, columns, strict=True):
                for p in column:
                    p.detach().copy_(point)
        history.append([jobs.values(m) for m in modules])
    mean = [
        torch.stack([p.detach() for p in column]).mean(0).reshape(-1).tolist()
        for column in zip(*[list(m.parameters()) for m in modules], strict=True)
    ]
    return history, mean


@pytest.mark.parametrize("method", ["sgd", "diloco"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_replicas_go_their_own_way_and_meet_like_the_simulated_ones(ranks: int, method: str) -> None:
    sync = Sync(word="local", method=method, every=4)
    found = run_ranks(ranks, train, sync)
    history, mean = simulate(ranks, sync)
    for rank, (apart, agreed, after, settled) in enumerate(found):
        for s in range(STEPS):
            for mine, theirs in zip(apart[s], history[s][rank], strict=True):
                assert mine == pytest.approx(theirs, abs=1e-9), (s, rank)
        for mine, theirs in zip(agreed, mean, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-9)
        assert after == apart[-1]  # looking at the mean changes nothing
        assert settled == agreed
    assert found[0][0][3] == found[1][0][3]  # where they meet they are alike, to the bit
    assert found[0][0][4] != found[1][0][4]


@pytest.mark.parametrize(
    ("bounds", "own", "bounded"),
    [((0.5, 0.99), (0.9, 0.95), (0.5, 0.99)), ((0.95, 0.0), (0.9, 0.95), (0.9, 0.95))],
)
def test_adams_moments_are_bounded_while_replicas_are_apart(bounds: Betas, own: Betas, bounded: Betas) -> None:
    sync = Sync(word="local", method="sgd", every=4, beta1=bounds[0], beta2=bounds[1])
    found = run_ranks(2, train, sync, STEPS, own)
    history, _ = simulate(2, sync, STEPS, bounded)
    for rank, (apart, *_) in enumerate(found):
        for s in range(STEPS):
            for mine, theirs in zip(apart[s], history[s][rank], strict=True):
                assert mine == pytest.approx(theirs, abs=1e-9), (s, rank)


def refused(rank: Rank) -> str:
    """In the first step, although it is exact."""
    with pytest.raises(SpecError) as caught:
        train(rank, Sync(word="local", method="post_local", start=5, every=2, beta1=0.8), steps=1)
    return str(caught.value)


def test_an_equal_gradient_moves_a_parameter_as_far_after_the_betas_changed() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, eps=0.0)
    moved = []
    for number in range(12):
        parameter.grad = torch.full_like(parameter, 2.0)
        before = parameter.detach().clone()
        if number == 5:
            carry_over([optimizer], 0.8, 0.99)
        with bounded_moments([optimizer], *((0.8, 0.99) if number >= 5 else (0.0, 0.0))):
            optimizer.step()
        moved.append(float((parameter.detach() - before)[0]))
    assert moved == pytest.approx([-1.0] * 12, rel=1e-9)


def test_an_optimizer_without_a_second_moment_keeps_its_first() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adamax([parameter], betas=(0.9, 0.95))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    carry_over([optimizer], 0.8, 0.99)
    state = optimizer.state[parameter]
    assert state["exp_avg"].tolist() == pytest.approx([0.2] * 3)  # what one step with 0.8 leaves
    assert state["exp_inf"].tolist() == pytest.approx([1.0] * 3)


def test_bounds_of_moments_that_no_optimizer_has_are_refused_at_once() -> None:
    assert all("the job has none" in text for text in run_ranks(2, refused))


def test_three_betas_are_not_adams() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0]["betas"] = (0.9, 0.99, 0.999)
    assert not groups_with_moments([optimizer])
    with bounded_moments([optimizer], 0.8, 0.995):
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.99, 0.999)


def exact_start(rank: Rank, sync: Sync) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    found = []
    for s in range(8):
        result = step(replica, [optimizer], jobs.share(s, SAMPLES, rank.rank, rank.world, 1), loss=jobs.loss)
        found.append((result.loss, jobs.values(module)))
    return found


def test_the_first_steps_are_exact_where_asked() -> None:
    one, two = run_ranks(2, exact_start, Sync(word="local", method="post_local", start=4, every=2))
    module = jobs.net().double()
    losses = jobs.one_process(module, torch.optim.SGD(module.parameters(), lr=0.05), SAMPLES, 4)
    assert [loss for loss, _ in one[:4]] == pytest.approx(losses, abs=1e-9)
    assert [same for (_, same), (_, other) in zip(one, two, strict=True) if same == other] == [
        one[s][1] for s in (0, 1, 2, 3, 5, 7)
    ]


def overlapped(rank: Rank, sync: Sync) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(float(rank.rank))  # the ranks are apart by 1, and never move by themselves
    seen = []
    for s in range(8):
        step(replica, [optimizer], jobs.share(s, SAMPLES, rank.rank, rank.world, 1), loss=jobs.loss)
        seen.append([p.detach().flatten()[0].item() for p in module.parameters()])
    base = [p.detach().flatten()[0].item() for p in jobs.net().double().parameters()]
    return [[round(value - b, 6) for value, b in zip(values, base, strict=True)] for values in seen]


def test_what_is_on_its_way_arrives_as_many_steps_later() -> None:
    for rank, moved in enumerate(run_ranks(2, overlapped, Sync(word="local", method="sgd", every=4, overlap=2))):
        assert [values[0] for values in moved] == [rank] * 5 + [0.5] * 3


def test_fragments_take_turns() -> None:
    sync = Sync(word="local", method="streaming", every=4, fragments=2, outer_lr=1.0, outer_momentum=0.0)
    for rank, moved in enumerate(run_ranks(2, overlapped, sync)):
        assert [values[0] for values in moved] == [rank] + [0.5] * 7  # the first half of the parameters
        assert [values[-1] for values in moved] == [rank] * 3 + [0.5] * 5


def interrupted(rank: Rank, sync: Sync, stop: int, kept: list[Any] | None) -> Any:
    """Train from the start to `stop`, or from there on with what was kept."""
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float64", sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    first, last = (0, stop) if kept is None else (stop, STEPS)
    if kept is not None:
        rows = {n: torch.stack([k.rows[n] for k, *_ in kept]) for n in kept[0][0].rows}
        optimizer.load_state_dict(kept[0][2])
        replica.load_state(kept[rank.rank % 2][3])
        with torch.no_grad():
            for p, value in zip(module.parameters(), kept[0][1], strict=True):
                p.copy_(torch.tensor(value, dtype=p.dtype).view_as(p))
        replica.synchroniser.take(KeptByAll(rows, kept[0][0].common, kept[0][0].plain), rank.rank, [optimizer])
    for s in range(first, last):
        step(replica, [optimizer], jobs.share(s, SAMPLES, rank.rank, rank.world, 1), loss=jobs.loss)
    found = replica.synchroniser.keep([optimizer])
    copied = found._replace(rows={n: t.clone() for n, t in found.rows.items()})
    with replica.synchroniser.consistent([optimizer]):
        return copied, jobs.values(module), copy.deepcopy(optimizer.state_dict()), replica.state()


@pytest.mark.parametrize("stop", [6, 8])
def test_a_run_that_was_kept_goes_on_as_if_nothing_had_happened(stop: int) -> None:
    sync = Sync(word="local", every=4)
    whole = run_ranks(2, interrupted, sync, STEPS, None)
    half = run_ranks(2, interrupted, sync, stop, None)
    again = run_ranks(2, interrupted, sync, stop, half)
    for (kept, mean, *_), (kept_again, mean_again, *_) in zip(whole, again, strict=True):
        assert mean == mean_again
        assert kept.rows.keys() == kept_again.rows.keys()
        assert all(torch.equal(kept.rows[name], kept_again.rows[name]) for name in kept.rows)


def test_a_run_that_was_kept_goes_on_with_another_number_of_ranks() -> None:
    sync = Sync(word="local", every=4)
    half = run_ranks(2, interrupted, sync, 6, None)
    more = run_ranks(3, interrupted, sync, 6, half)
    assert len({str(mean) for _, mean, *_ in more}) == 1


def still(rank: Rank, sync: Sync) -> Any:
    """Replicas that stand apart and never move by themselves: after every step, all parameters in one list."""
    module = jobs.net()
    plan = Plan(data=rank.world, sync=sync)
    replica = parallelize(module, plan, rank.mesh(plan))
    torch.manual_seed(rank.rank)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    seen = []
    for s in range(36 if sync.bits == 2 else 12):  # outliers take several meetings
        step(replica, [optimizer], jobs.share(s, SAMPLES, rank.rank, rank.world, 1), loss=jobs.loss)
        seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return seen


@pytest.mark.parametrize(
    "sync",
    [
        Sync(word="local", method="sgd", every=2, bits=16),
        Sync(word="local", method="sgd", every=2, bits=8),
        Sync(word="local", method="sgd", every=2, bits=4, overlap=1),
        Sync(word="local", method="sgd", every=2, bits=2, overlap=1),
        Sync(word="local", method="sparse", every=2, density=0.25),
        Sync(word="local", method="sparse", every=2, density=0.25, overlap=1),
    ],
    ids=lambda sync: f"{sync.method}-{sync.bits}-{sync.overlap}",
)
def test_what_a_codec_leaves_out_is_told_later_and_the_mean_stays(sync: Sync) -> None:
    seen = [torch.stack(each).double() for each in zip(*run_ranks(3, still, sync), strict=True)]
    start = seen[0].mean(0)
    for values in seen:
        torch.testing.assert_close(values.mean(0), start, rtol=0, atol=1e-5)
    spread = [(values - values.mean(0)).abs().max().item() for values in seen]
    assert spread[0] > 1
    assert spread[-1] < 0.02 * spread[0]
