"""Models of timm, without a change: in stages, and split where they have attention or MLPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import loss
from test_stage import cut, forward_and_backward
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.tensor.find import find_splits
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 4}
WINDOWS = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "cait_xxs24_224": SMALL,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32)},
    "resnet18": {},
    "efficientnet_b0": {},
}
CONVOLUTIONS = ("resnet18", "efficientnet_b0")


def build(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name, num_classes=10, **MODELS[name])
    for part in module.modules():
        for chance in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(part, chance, None), float):
                setattr(part, chance, 0.0)
    return module.double().train()


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def whole(name: str) -> tuple[float, dict[str, Tensor]]:
    module = build(name)
    total = loss(module(**batch()), None)[0]
    total.backward()
    return total.item(), {key: p.grad for key, p in module.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(float(grad.norm()) for grad in expected.values())
    for key, grad in expected.items():
        assert float((found[key] - grad).norm()) <= 1e-6 * max(float(grad.norm()), floor), key


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_compute_what_the_whole_module_computes(name: str, stages: int) -> None:
    total, expected = whole(name)
    pieces = cut(build(name), batch(), stages)
    assert float(forward_and_backward(pieces, batch())) == pytest.approx(total, rel=1e-6)
    found: dict[str, Tensor] = {}
    for stage in pieces.stages:
        for key, p in stage.module.named_parameters():
            if p.grad is not None:
                found[key] = found[key] + p.grad if key in found else p.grad
    same(found, expected)


def split(rank: Rank, name: str, plan: Plan) -> tuple[float, dict[str, Tensor]]:
    module = build(name)
    tensors = parallelize(module, plan, rank.mesh(plan)).tensors
    assert tensors is not None
    total = loss(module(**batch()), None)[0]
    total.backward()
    grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    joined = {key: tensors.links.join(g, *tensors.owned[key]) for key, g in grads.items() if key in tensors.owned}
    return total.item(), grads | joined


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CONVOLUTIONS])
def test_split_layers_compute_what_the_whole_module_computes(name: str) -> None:
    total, expected = whole(name)
    plan = Plan(tensor=2, precision="float64", splits=find_splits(build(name), batch(), 2).splits)
    for here, found in run_ranks(2, split, name, plan):
        assert here == pytest.approx(total, rel=1e-6)
        same(found, expected)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_not_split(name: str) -> None:
    with pytest.raises(JobError, match="nothing in this model can be split"):
        find_splits(build(name), batch(), 2)
