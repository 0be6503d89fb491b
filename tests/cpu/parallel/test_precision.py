"""Formats of a step: autocast, float16 with loss scaling, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.precision import Formats, LossScaler
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan, Precision
from tests.cpu.parallel import jobs
from tests.ranks import Rank, run_ranks


def train(rank: Rank, precision: Precision, pieces: int, steps: int = 8) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision=precision)
    replica = parallelize(module, plan, rank.mesh(plan))
    if replica.scaler is not None:
        replica.scaler.scale = 64.0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    seen: list[str] = []
    module[3].register_forward_hook(lambda m, args, output: seen.append(str(output.dtype)))
    results = [
        step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world, pieces), loss=jobs.loss)
        for s in range(steps)
    ]
    dtypes = {str(p.dtype) for p in module.parameters()}
    return [r.loss for r in results], set(seen), dtypes, [r.skipped for r in results]


@pytest.mark.parametrize(
    ("precision", "computed", "kept", "rel"),
    [
        ("float32", "torch.float32", "torch.float32", 1e-4),
        ("bfloat16", "torch.bfloat16", "torch.float32", 5e-2),
        ("float16", "torch.float16", "torch.float32", 1e-2),
        ("float64", "torch.float64", "torch.float64", 1e-9),
    ],
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_formats_compute_as_they_say_and_keep_parameters_wide(
    precision: Precision, computed: str, kept: str, rel: float, pieces: int
) -> None:
    module = jobs.net().double()
    expected = jobs.one_process(module, torch.optim.SGD(module.parameters(), lr=0.05), 8, 8)
    for losses, seen, dtypes, skipped in run_ranks(2, train, precision, pieces):
        assert losses == pytest.approx(expected, rel=rel)
        assert seen == {computed}
        assert dtypes == {kept}
        assert not any(skipped)


def overflowing(rank: Rank) -> Any:
    module = jobs.net()
    plan = Plan(data=rank.world, precision="float16")
    replica = parallelize(module, plan, rank.mesh(plan))
    assert replica.scaler is not None
    replica.scaler.scale = 2.0**18
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    results, scales, prints = [], [], []
    for s in range(12):
        results.append(step(replica, [optimizer], jobs.share(s, 8, rank.rank, rank.world), loss=jobs.loss).skipped)
        scales.append(replica.scaler.scale)
        prints.append(jobs.fingerprint(module))
    return results, scales, prints, replica.state()["loss_scale"]


def test_an_overflow_skips_the_step_on_all_ranks_and_halves_the_scale() -> None:
    first, second = run_ranks(2, overflowing)
    assert first == second
    skipped, scales, prints, saved = first
    assert skipped[0]
    assert not skipped[-1]
    for index, (skip, scale) in enumerate(zip(skipped, scales, strict=True)):
        before = scales[index - 1] if index else 2.0**18
        assert scale == (before / 2 if skip else before)
        assert index == 0 or skip == (prints[index] == prints[index - 1])
    assert saved == scales[-1]


def test_the_scale_doubles_after_enough_good_steps() -> None:
    scaler = LossScaler(scale=4.0, patience=3)
    for _ in range(3):
        scaler.update(finite=True)
    assert scaler.scale == 8.0
    scaler.update(finite=False)
    assert (scaler.scale, scaler.good_steps) == (4.0, 0)


def test_parameters_are_cast_once_for_all_microbatches() -> None:
    formats = Formats("bfloat16", torch.device("cpu"))
    layer = torch.nn.Linear(4, 4)
    grads = []
    with formats.step(several=True):
        for _ in range(2):
            with formats.forward():
                output = layer(torch.ones(2, 4))
            output.float().sum().backward()
            assert layer.weight.grad is not None
            grads.append(layer.weight.grad.clone())
    assert torch.equal(grads[1], 2 * grads[0])
    with formats.forward():
        layer.weight.data.zero_()
        assert layer(torch.ones(2, 4)).abs().max() <= layer.bias.abs().max() + 1e-2
