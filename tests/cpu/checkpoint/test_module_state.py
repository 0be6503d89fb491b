"""Modules and optimizers as named tensors: every optimizer of torch, ties, names, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardwise.checkpoint.load import latest, load
from shardwise.checkpoint.resume import resume
from shardwise.checkpoint.state import collect, module_tensors, optimizer_tensors, tied_names
from shardwise.checkpoint.store import MemoryStore
from shardwise.errors import CheckpointError
from shardwise.spec.plan import Plan
from tests.cpu.checkpoint.world import Net, bits, optimizers_of, save_alone, trained


def test_names_of_a_module() -> None:
    net = Net(seed=0)
    names = set(module_tensors(net))
    assert "model/embed.weight" in names
    assert "model/head.weight" not in names, "a tied parameter is there once"
    assert "buffer/body.1.num_batches_tracked" in names
    assert "buffer/passing" not in names, "the module does not keep it"
    assert tied_names(net) == {"head.weight": "embed.weight"}
    kept = {name.partition("/")[2] for name in names} | {"head.weight"}
    assert kept == set(net.state_dict())


class Compiled(nn.Module):
    """A module around another under the name that `torch.compile` gives it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_a_compiled_module_has_the_names_of_the_plain_one() -> None:
    net = Net(seed=0)
    expected = module_tensors(net)
    assert bits(module_tensors(Compiled(net))) == bits(expected)
    net.body[0] = Compiled(net.body[0])
    assert bits(module_tensors(net)) == bits(expected)
    assert tied_names(Compiled(net)) == {"head.weight": "embed.weight"}


def step_once(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = net(torch.linspace(-1, 1, 12).reshape(4, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"fused": True},
    "Adamax": {},
    "ASGD": {},
    "LBFGS": {"history_size": 3},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Muon": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_goes_on_bit_for_bit(name: str) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 5, bias=name != "Muon"), nn.Tanh(), nn.Linear(5, 2, bias=name != "Muon"))
        return net, getattr(torch.optim, name)(net.parameters(), lr=0.05, **OPTIMIZERS[name])

    net, optimizer = build(0)
    for _ in range(3):
        step_once(net, optimizer)
    store = MemoryStore()
    tensors, scalars = collect(net, [optimizer])
    save_alone(store, tensors=tensors, scalars=scalars)
    fresh, fresh_optimizer = build(1)
    assert resume(store, fresh, [fresh_optimizer], plan=Plan(), rank=0) is not None
    for _ in range(3):
        step_once(net, optimizer)
        step_once(fresh, fresh_optimizer)
    assert bits(collect(fresh, [fresh_optimizer])[0]) == bits(collect(net, [optimizer])[0])
    assert fresh_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_low_precision_parameters_keep_their_float32_moments() -> None:
    net = nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    moment = torch.tensor([[1.0 + 2**-20, 2.0], [3.0, 4.0]])
    optimizer.state[net.weight]["moment"] = moment
    store = MemoryStore()
    tensors, scalars = collect(net, [optimizer])
    save_alone(store, tensors=tensors, scalars=scalars)
    fresh = nn.Linear(2, 2).bfloat16()
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    resume(store, fresh, [fresh_optimizer], plan=Plan(), rank=0)
    assert torch.equal(fresh_optimizer.state[fresh.weight]["moment"], moment)


def test_hyperparameters_come_back_but_not_how_the_optimizer_computes() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.25), betas=(0.5, 0.75), foreach=False)
    step_once(nn.Sequential(nn.Linear(3, 2), net), optimizer)
    optimizer.param_groups[0]["initial_lr"] = 0.125
    store = MemoryStore()
    tensors, scalars = collect(net, [optimizer])
    save_alone(store, tensors=tensors, scalars=scalars)
    fresh = nn.Linear(2, 2)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=torch.tensor(9.0), fused=True)
    rate = fresh_optimizer.param_groups[0]["lr"]
    resume(store, fresh, [fresh_optimizer], plan=Plan(), rank=0)
    group = fresh_optimizer.param_groups[0]
    assert group["lr"] is rate
    assert rate.item() == 0.25
    assert (group["betas"], group["initial_lr"], group["fused"]) == ((0.5, 0.75), 0.125, True)


class Counting(nn.Linear):
    """A module with state of its own."""

    seen: Any = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state_of_a_module_is_kept_and_refused_when_it_is_no_plain_data() -> None:
    net = nn.Sequential(Counting(2, 2))
    net[0].seen = (3, "x")
    tensors, scalars = collect(net)
    store = MemoryStore()
    save_alone(store, tensors=tensors, scalars=scalars)
    fresh = nn.Sequential(Counting(2, 2))
    resume(store, fresh, plan=Plan(), rank=0)
    assert fresh[0].seen == (3, "x")
    net[0].seen = object()
    with pytest.raises(CheckpointError, match=r"scalars\.extra_state\.0\.seen is a object"):
        save_alone(store, step=2, tensors=tensors, scalars=collect(net)[1])


def test_a_slash_in_a_name_is_no_separator() -> None:
    net = nn.ModuleDict({"a/b": nn.Linear(2, 2), "a%2Fb": nn.Linear(2, 3)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    store = MemoryStore()
    tensors, scalars = collect(net, [optimizer])
    assert "optimizer/a%2Fb.weight/momentum_buffer" in tensors
    save_alone(store, tensors=tensors, scalars=scalars)
    fresh = nn.ModuleDict({"a/b": nn.Linear(2, 2), "a%2Fb": nn.Linear(2, 3)})
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    resume(store, fresh, [fresh_optimizer], plan=Plan(), rank=0)
    assert bits(collect(fresh, [fresh_optimizer])[0]) == bits(tensors)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"optimizer 0 \(SGD\) holds a parameter of shape \(3,\)"):
        optimizer_tensors([torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)], net)
    both = [torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam([net.bias])]
    with pytest.raises(CheckpointError, match=r"optimizer 1 \(Adam\) holds the parameter 'bias'"):
        optimizer_tensors(both, net)


def resume_error(net: nn.Module, optimizers: list[torch.optim.Optimizer]) -> str:
    trained_net, trained_optimizers = trained()
    tensors, scalars = collect(trained_net, trained_optimizers)
    store = MemoryStore()
    save_alone(store, tensors=tensors, scalars=scalars)
    before = bits(module_tensors(net))
    with pytest.raises(CheckpointError) as caught:
        resume(store, net, optimizers, plan=Plan(), rank=0)
    assert bits(module_tensors(net)) == before, "nothing is changed by a checkpoint of another model"
    return str(caught.value)


def test_a_checkpoint_of_another_model_names_the_first_differences() -> None:
    text = resume_error(nn.Sequential(nn.Linear(2, 2)), [])
    assert "of another model" in text
    assert "2 missing in the checkpoint (model/0.weight, model/0.bias)" in text
    assert "not in the model (model/scale, model/strided, model/brief, ...)" in text
    net = Net(seed=0)
    net.scale = nn.Parameter(torch.zeros(2))
    net.brief = nn.Parameter(torch.zeros(6))
    text = resume_error(net, [])
    assert "model/scale: float32[] in the checkpoint, float32[2] in the model" in text
    assert "model/brief: bfloat16[6] in the checkpoint, float32[6] in the model" in text


def test_other_optimizers_are_refused() -> None:
    net = Net(seed=0)
    assert "['AdamW', 'SGD'], the job has ['SGD']" in resume_error(net, optimizers_of(net)[1:])
    adam, sgd = optimizers_of(net)
    sgd.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert "optimizer 1 (SGD) has" in resume_error(net, [adam, sgd])


def test_a_checkpoint_without_optimizers_says_so() -> None:
    net = Net(seed=0)
    store = MemoryStore()
    save_alone(store, tensors=module_tensors(net))
    with pytest.raises(CheckpointError, match="no readable optimizer state"):
        resume(store, net, optimizers_of(net), plan=Plan(), rank=0)


@pytest.mark.parametrize("state", [{"exp_avg": 5}, {"exp_avg": {"tensor": "model/none"}}, {"exp_avg": {"call": "x"}}])
def test_a_described_state_that_makes_no_sense_is_refused(state: dict[str, Any]) -> None:
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    tensors, scalars = collect(net, [optimizer])
    scalars["optimizers"][0]["state"] = {"weight": state}
    store = MemoryStore()
    save_alone(store, tensors=tensors, scalars=scalars)
    with pytest.raises(CheckpointError, match="no readable optimizer state"):
        resume(store, net, [optimizer], plan=Plan(), rank=0)


def test_frozen_and_never_used_parameters_have_no_state_and_need_none() -> None:
    net, optimizers = trained()
    tensors, _ = collect(net, optimizers)
    assert "model/frozen" in tensors
    assert not [name for name in tensors if name.startswith("optimizer/frozen/")]


def test_load_leaves_requires_grad_and_storage_alone() -> None:
    net = Net(seed=0)
    store = MemoryStore()
    save_alone(store, tensors=module_tensors(net))
    fresh = Net(seed=1)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in fresh.named_parameters()}
    manifest = latest(store)
    assert manifest is not None
    load(store, manifest, module_tensors(fresh), Plan(), 0)
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in fresh.named_parameters()} == before
