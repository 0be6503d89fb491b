"""The shard axis trains like one process: states, gradients or parameters cut by rows, alone and with other axes."""

from __future__ import annotations

import pytest
import torch
from test_pipelined import CLOSE, MICROS, MODELS, compare, cut, in_stages

from shardwise.spec.plan import Plan
from tests.ranks import run_ranks

QUICK = (("tied", 1), ("tied", 2), ("dropout", 3))
NORMS = ("norm", "resnet")  # over the samples of all ranks: no one process has the same
WITHOUT_NORMS = [name for name in MODELS if name not in NORMS]


@pytest.mark.parametrize(
    ("name", "zero"),
    [pytest.param(n, z, marks=[] if (n, z) in QUICK else pytest.mark.slow) for n in WITHOUT_NORMS for z in (1, 2, 3)],
)
def test_two_shards_train_like_one_process(name: str, zero: int) -> None:
    compare(name, shard=2, zero=zero)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["tied", pytest.param("frozen", marks=pytest.mark.slow)])
def test_replicas_of_shards_train_like_one_process(name: str, zero: int) -> None:
    compare(name, {"clip_norm": 0.5}, data=2, shard=2, zero=zero)


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        pytest.param(n, z, marks=[] if (n, z) in (("tied", 3),) else pytest.mark.slow)
        for n in WITHOUT_NORMS
        for z in (1, 2, 3)
    ],
)
def test_shards_of_stages_train_like_one_process(name: str, zero: int) -> None:
    compare(name, shard=2, pipeline=2, zero=zero)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "virtual"), [("naive", 1), ("interleaved", 2), ("zero_bubble", 2), ("zbv", 2)])
def test_shards_train_alike_under_every_schedule(schedule: str, virtual: int) -> None:
    compare("dropout", shard=2, pipeline=2, zero=3, schedule=schedule, virtual=virtual)
    compare("tied", shard=2, pipeline=2, zero=3, schedule=schedule, virtual=virtual)


@pytest.mark.parametrize(
    ("name", "zero", "pipeline"),
    [
        ("resnet", 3, 1),
        *(
            pytest.param(n, z, p, marks=pytest.mark.slow)
            for n in NORMS
            for z in (1, 2, 3)
            for p in (1, 2)
            if (n, z, p) != ("resnet", 3, 1)
        ),
    ],
)
def test_norms_over_shards_are_those_over_replicas(name: str, zero: int, pipeline: int) -> None:
    plan = Plan(shard=2, zero=zero, pipeline=pipeline, precision="float64", microbatches=MICROS)
    expected = run_ranks(2, in_stages, name, Plan(data=2, precision="float64", microbatches=MICROS), {})[0]
    plan = cut(name, plan) if pipeline > 1 else plan
    for curve, tested, values, _ in run_ranks(plan.ranks, in_stages, name, plan, {}):
        assert torch.tensor(curve).allclose(torch.tensor(expected[0]), rtol=CLOSE)
        assert tested == pytest.approx(expected[1], rel=CLOSE)
        assert all(torch.allclose(values[key], value, rtol=1e-6, atol=1e-9) for key, value in expected[2].items())
