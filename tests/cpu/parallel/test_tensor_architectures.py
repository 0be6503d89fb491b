"""Published architectures, without a change, split over two ranks: the loss and every gradient are one process's."""

from __future__ import annotations

import pytest
import torch
from architectures import NAMES, batch, build, loss
from torch import Tensor

from shardwise.errors import JobError
from shardwise.models.inputs import call
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.tensor.find import find_splits
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

QUICK = ("gpt2", "t5", "mixtral", "spellings")
WITHOUT = ("resnet", "unet")  # neither attention nor MLPs
SPLIT = [name for name in NAMES if name not in WITHOUT]
LEAST = 0.6  # of the parameters
LESS = {"lstm": 0.4, "tied": 0.5, "frozen": 0.5}  # recurrent layers stay whole


def gradients(rank: Rank, name: str, plan: Plan) -> tuple[float, dict[str, Tensor], float]:
    module = build(name)
    replica = parallelize(module, plan, rank.mesh(plan))
    total = loss(call(module, batch(name)), None)[0]
    total.backward()
    tensors = replica.tensors
    assert tensors is not None
    found = {}
    for key, p in module.named_parameters():
        if p.grad is not None:
            found[key] = tensors.links.join(p.grad, *tensors.owned[key]) if key in tensors.owned else p.grad
    held = sum(p.numel() for p in module.parameters())
    return total.item(), found, held


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SPLIT])
def test_loss_and_gradients_are_those_of_one_process(name: str) -> None:
    module = build(name)
    plan = Plan(tensor=2, precision="float64", splits=find_splits(module, batch(name), 2).splits)
    total = loss(call(module, batch(name)), None)[0]
    total.backward()
    expected = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    floor = 1e-6 * max(float(grad.norm()) for grad in expected.values())
    whole = sum(p.numel() for p in module.parameters())
    for here, found, held in run_ranks(2, gradients, name, plan):
        assert here == pytest.approx(total.item(), rel=1e-6)
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            assert float((found[key] - grad).norm()) <= 1e-6 * max(float(grad.norm()), floor), key
        assert held <= whole * (1 - LESS.get(name, LEAST) / 2)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_nothing_to_split_is_refused(name: str) -> None:
    with pytest.raises(JobError, match="nothing in this model can be split"):
        find_splits(build(name), batch(name), 2)


def test_finding_splits_leaves_the_module_as_it_was() -> None:
    module = build("gpt2")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    find_splits(module, batch("gpt2"), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.config.use_cache
    assert not any("forward" in vars(part) or part._forward_pre_hooks for part in module.modules())
