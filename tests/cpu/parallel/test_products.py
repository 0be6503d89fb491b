"""Every product of the axes up to eight ranks trains like one process; what norms over samples allow, like replicas."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import test_pipelined
import test_tensor_trained
import torch
from test_pipelined import CLOSE, MICROS, cut, in_stages

from shardwise.spec.plan import Plan
from tests.ranks import run_ranks

AXES = ("data", "shard", "tensor", "pipeline")
NAMES = ("gpt", "encoder", "tied", "dropout", "frozen")
PRODUCTS = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4), repeat=len(AXES))
    if 1 < sizes[0] * sizes[1] * sizes[2] * sizes[3] <= 8 and sum(size == 4 for size in sizes) <= 1
]
QUICK = {"data": 1, "shard": 2, "tensor": 2, "pipeline": 1}


def title(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(f"{axis}={size}" for axis, size in value.items() if size > 1)


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        pytest.param(axes, name, marks=[] if axes == QUICK and name == "tied" else pytest.mark.slow)
        for axes in PRODUCTS
        for name in NAMES
        if 4 not in axes.values() or name == "dropout"
    ],
    ids=title,
)
def test_a_product_of_axes_trains_like_one_process(axes: dict[str, int], name: str) -> None:
    if axes["tensor"] > 1:
        test_tensor_trained.compare(name, {"clip_norm": 0.5}, **axes)
    else:
        test_pipelined.compare(name, {"clip_norm": 0.5}, **axes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [axes for axes in PRODUCTS if axes["tensor"] == 1 and 4 not in axes.values()], ids=title
)
def test_norms_over_samples_train_like_replicas(axes: dict[str, int]) -> None:
    plan = Plan(precision="float64", microbatches=MICROS, **axes)
    data = Plan(data=plan.replicas, precision="float64", microbatches=MICROS)
    expected = run_ranks(data.ranks, in_stages, "resnet", data, {})[0]
    plan = cut("resnet", plan) if plan.pipeline > 1 else plan
    for curve, tested, values, _ in run_ranks(plan.ranks, in_stages, "resnet", plan, {}):
        assert torch.tensor(curve).allclose(torch.tensor(expected[0]), rtol=CLOSE)
        assert tested == pytest.approx(expected[1], rel=CLOSE)
        assert all(torch.allclose(values[key], value, rtol=1e-6, atol=1e-9) for key, value in expected[2].items())
