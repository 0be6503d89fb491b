"""Activations cut along the sequence over the tensor ranks: one process's numbers, less kept, as many bytes sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import batch, build, loss
from test_tensor_architectures import SPLIT, gradients
from test_tensor_trained import compare
from torch import Tensor, nn

from shardwise.errors import SpecError
from shardwise.models.gpt import GPT
from shardwise.models.inputs import call
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.tensor.find import find_splits
from shardwise.plan.support import refuse_unbuilt
from shardwise.spec.plan import Plan, Recompute, parse_plan
from tests.ranks import Rank, run_ranks

QUICK = ("gpt2", "llama", "bert")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SPLIT])
def test_loss_and_gradients_are_those_of_one_process(name: str) -> None:
    module = build(name)
    plan = Plan(tensor=2, sequence=True, precision="float64", splits=find_splits(module, batch(name), 2).splits)
    total = loss(call(module, batch(name)), None)[0]
    total.backward()
    expected = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    floor = 1e-6 * max(float(grad.norm()) for grad in expected.values())
    tolerance = 1e-6 if name in ("gemma", "gemma3", "mamba") else 1e-10  # those compute in float32 inside
    for here, found, _ in run_ranks(2, gradients, name, plan):
        assert here == pytest.approx(total.item(), rel=tolerance)
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            assert float((found[key] - grad).norm()) <= tolerance * max(float(grad.norm()), floor), key


def test_dropout_and_lengths_that_change_train_like_one_process() -> None:
    compare("dropout", {"clip_norm": 0.5}, tensor=2, sequence=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [{"data": 2}, {"pipeline": 2}, {"shard": 2}, {"recompute": Recompute(mode="full")}]
    + [{"recompute": Recompute(mode="full"), "pipeline": 2}, {"pipeline": 2, "schedule": "interleaved", "virtual": 2}],
)
@pytest.mark.parametrize("name", ["dropout", "encoder"])
def test_with_other_axes_it_trains_like_one_process(name: str, axes: dict[str, Any]) -> None:
    compare(name, tensor=2, sequence=True, **axes)


class Layers(nn.Module):
    """torch's own encoder on [T, B, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def of_length(rank: Rank, length: int, plan: Plan) -> tuple[list[Tensor], dict[str, tuple[int, int]]]:
    torch.manual_seed(3)
    mesh = rank.mesh(plan)
    module = Layers().double()
    replica = parallelize(module, plan, mesh) if plan.tensor > 1 else None
    x = torch.randn(length, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = module(x)
    (found * torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).view(found.shape)).sum().backward()
    assert x.grad is not None
    owned = replica.tensors.owned if replica is not None and replica.tensors is not None else {}
    norms = [p.grad for name, p in module.named_parameters() if name not in owned and "norm" in name]
    whole = found + 0
    return [whole.detach(), x.grad, *(grad for grad in norms if grad is not None)], mesh.wire()


@pytest.mark.parametrize("length", [1, 7])
def test_uneven_and_short_sequences_with_the_sequence_first(length: int) -> None:
    x = torch.randn(6, 2, 16, dtype=torch.float64)
    splits = find_splits(Layers().double(), x, 2).splits
    expected, _ = run_ranks(1, of_length, length, Plan(precision="float64"))[0]
    plan = Plan(tensor=2, sequence=True, precision="float64", splits=splits)
    for found, wire in run_ranks(2, of_length, length, plan):
        assert "reduce_scatter" in wire
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def kept(rank: Rank, plan: Plan, dropout: float) -> tuple[int, int]:
    """Bytes that forward keeps for backward beside the parameters, and bytes of a step's messages."""
    mesh = rank.mesh(plan)
    module = GPT(layers=4, width=64, heads=4, vocab=64, context=64, dropout=dropout)
    parallelize(module, plan, mesh)
    tokens = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(1))
    fixed = {p.untyped_storage()._cdata for p in module.parameters()}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and tensor.untyped_storage()._cdata not in fixed:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    before = sum(nbytes for _, nbytes in mesh.wire().values())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())
    total.backward()
    return sum(seen.values()), sum(nbytes for _, nbytes in mesh.wire().values()) - before


def test_less_is_kept_for_backward() -> None:
    tokens = {"tokens": torch.zeros(1, 64, dtype=torch.int64)}
    for dropout in (0.0, 0.1):
        splits = find_splits(GPT(layers=4, width=64, heads=4, vocab=64, context=64, dropout=dropout), tokens, 2).splits
        whole, sent = run_ranks(2, kept, Plan(tensor=2, splits=splits), dropout)[0]
        cut, sent_cut = run_ranks(2, kept, Plan(tensor=2, splits=splits, sequence=True), dropout)[0]
        print(f"dropout={dropout}: kept {whole} -> {cut}, handed to collectives {sent} -> {sent_cut}")
        assert cut < 0.9 * whole
        assert sent_cut < 1.55 * sent  # an all-reduce of n counts n, its halves count n and n / 2, and send as much


def test_it_needs_a_tensor_axis() -> None:
    assert parse_plan("tensor=2,sequence=true") == {"tensor": "2", "sequence": True}
    with pytest.raises(SpecError, match="Add tensor=2"):
        Plan(sequence=True)


def test_schedules_that_go_back_twice_are_refused() -> None:
    plan = Plan(tensor=2, pipeline=2, sequence=True, schedule="zero_bubble", virtual=2)
    with pytest.raises(SpecError, match="goes back through each block twice"):
        refuse_unbuilt(plan)
