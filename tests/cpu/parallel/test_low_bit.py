"""Fewer bits for what the optimizer keeps: bounds of the formats, and runs that stay close to those in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Micro
from msgspec import structs
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.models.gpt import GPT
from shardwise.models.losses import next_token_loss
from shardwise.parallel.low_bit import BLOCK, ERROR, codes_of, dequantize, quantize, round_by_chance
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.step import step
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

VOCAB, LENGTH = 61, 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3 * BLOCK + 7),
    st.integers(0, 10**6),
    st.sampled_from([1e-43, 1e-30, 1e-8, 1.0, 1e20]),
    st.booleans(),
)
def test_what_comes_back_from_eight_bits_is_within_the_bound(count: int, seed: int, size: float, signed: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draw) * torch.rand(count, generator=draw) ** 6 * size
    values = values if signed else values.abs()
    codes, scales = quantize(values, signed=signed)
    assert codes.dtype == torch.uint8
    assert (len(codes), len(scales)) == (count, -(-count // BLOCK))
    error = (dequantize(codes, scales, signed=signed) - values).abs()
    largest = scales.abs().repeat_interleave(BLOCK)[:count]
    assert bool((error <= ERROR[signed] * largest * 1.0001 + 2e-45).all()), "and the last bit of the smallest numbers"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * BLOCK + 7), st.integers(0, 10**6), st.sampled_from([1e-20, 1e-8, 1.0, 1e20]), st.booleans())
def test_what_has_come_back_is_kept_to_the_bit(count: int, seed: int, size: float, signed: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draw) * torch.rand(count, generator=draw) ** 6 * size
    codes, scales = quantize(values if signed else values.abs(), signed=signed)
    back = dequantize(codes, scales, signed=signed)
    again = quantize(back, signed=signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert torch.equal(dequantize(*again, signed=signed), back)


def test_the_codes_are_256_and_dense_near_zero() -> None:
    for signed in (True, False):
        codes = codes_of(signed)
        assert len(codes) == len(codes.unique()) == 256
        positive = codes[codes > 0]
        assert float(positive.min()) < 1e-6
        assert float(positive.max()) == 1.0


def test_what_is_divided_by_never_becomes_zero() -> None:
    values = torch.tensor([1.0, 1e-12, 0.0])
    back = dequantize(*quantize(values, signed=False), signed=False)
    assert back[1] > 0
    assert back[2] == 0


def test_rounding_by_chance_keeps_the_mean_and_what_is_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    value = torch.full((200_000,), 1 + 0.3 * 2.0**-7)  # between two bfloat16 numbers that are 2^-7 apart
    rounded = round_by_chance(value, draw).float()
    assert sorted(rounded.unique().tolist()) == [1.0, 1 + 2.0**-7]
    assert float((rounded - 1).mean() * 2.0**7) == pytest.approx(0.3, abs=0.01)
    kept = torch.tensor([0.0, -1.5, float("inf"), -float("inf")])
    assert torch.equal(round_by_chance(kept, draw).float(), kept)
    assert bool(round_by_chance(torch.tensor([float("nan")]), draw).isnan())


def gpt() -> nn.Module:
    torch.manual_seed(4)
    return GPT(layers=2, width=64, heads=2, vocab=VOCAB * 2, context=LENGTH)


def batch(number: int) -> list[Micro]:
    """Counting modulo a prime: there is something to learn."""
    g = torch.Generator().manual_seed(number)
    tokens = (torch.randint(0, VOCAB, (8, 1), generator=g) + torch.arange(LENGTH + 1) * 3) % VOCAB
    return [Micro({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, number)]


def train(replica: Replica, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    numbers = range(first, first + steps)
    return [step(replica, [optimizer], batch(n), loss=next_token_loss, clip_norm=1.0).loss for n in numbers]


def curve(plan: Plan, steps: int = 40, **options: Any) -> tuple[list[float], Replica, torch.optim.Optimizer]:
    module = gpt()
    replica = parallelize(module, plan, Rank(0, 1, None).mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, **options)
    return train(replica, optimizer, steps), replica, optimizer


FORMATS = [
    Plan(states="bfloat16"),
    Plan(states="int8"),
    Plan(precision="bfloat16", parameters="bfloat16"),
    Plan(precision="bfloat16", parameters="bfloat16", master="none"),
    Plan(precision="bfloat16", parameters="bfloat16", master="none", states="int8"),
]


QUICK = [pytest.param(plan, marks=[] if number in (1, 3) else pytest.mark.slow) for number, plan in enumerate(FORMATS)]


@pytest.mark.parametrize("plan", QUICK, ids=str)
def test_the_loss_stays_close_to_that_of_float32(plan: Plan) -> None:
    wide, _, _ = curve(Plan(precision=plan.precision))
    found, replica, _ = curve(plan)
    assert wide[-1] < 0.5 * wide[0], "it learns"
    assert sum(found[-10:]) == pytest.approx(sum(wide[-10:]), rel=0.06)
    replica.close()
    assert {p.dtype for p in replica.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("plan", FORMATS, ids=str)
def test_the_memory_is_that_of_the_formats(plan: Plan) -> None:
    _, replica, optimizer = curve(plan, steps=2)
    large = [p for p in replica.module.parameters() if p.numel() >= 4096 and p.dim() > 1]
    assert {p.dtype for p in large} == {getattr(torch, plan.parameters)}
    count = sum(p.numel() for p in large)
    with replica.updates.shown([optimizer]):
        states = [v for p in large for k, v in optimizer.state[p].items() if k != "step"]
        sizes = sum(t.nbytes for value in states for t in (value.values() if isinstance(value, dict) else [value]))
    each = {"float32": 8, "bfloat16": 4, "int8": 2 + 8 / BLOCK}[plan.states]
    assert sizes == pytest.approx(count * each, rel=0.01)


def two(rank: Rank, plan: Plan) -> tuple[list[float], list[float]]:
    module = gpt()
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for number in range(5):
        whole = batch(number)[0].batch
        share = {key: value[4 * rank.rank : 4 * rank.rank + 4] for key, value in whole.items()}
        losses.append(step(replica, [optimizer], [Micro(share, number)], loss=next_token_loss).loss)
    return losses, [float(p.detach().float().sum()) for p in module.parameters()]


@pytest.mark.parametrize("plan", [FORMATS[1], FORMATS[3]], ids=str)
def test_replicas_round_alike(plan: Plan) -> None:
    found = run_ranks(2, two, structs.replace(plan, data=2))
    assert found[0] == found[1]
    alone, _, _ = curve(plan, steps=5)
    assert found[0][0] == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adafactor", "NAdam", "Muon"])
def test_other_optimizers_of_torch_keep_their_states_so_too(kind: str) -> None:
    def losses(plan: Plan) -> list[float]:
        torch.manual_seed(4)
        module = nn.Sequential(nn.Linear(80, 80, bias=False), nn.Linear(80, 80, bias=False))
        replica = parallelize(module, plan, Rank(0, 1, None).mesh(plan))
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizer = getattr(torch.optim, kind)(module.parameters(), lr=1e-2, **options)
        x = torch.randn(20, 80, generator=torch.Generator().manual_seed(1))

        def loss(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            return (output - 3 * x).square().sum(), output.new_tensor(float(output.numel()))

        return [step(replica, [optimizer], [Micro({"input": x}, 0)], loss=loss).loss for _ in range(10)]

    wide = losses(Plan())
    assert losses(Plan(states="int8"))[-1] == pytest.approx(wide[-1], rel=0.02)
    assert losses(Plan(states="bfloat16"))[-1] == pytest.approx(wide[-1], rel=0.02)


class Together(torch.optim.Optimizer):
    """Divides by the norm of all gradients: not what one parameter can do alone."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for p in parameters:
            p.sub_(p.grad / norm, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [Together, torch.optim.LBFGS])
def test_an_optimizer_that_looks_at_all_parameters_together_is_refused(kind: Any) -> None:
    plan = Plan(states="int8")
    module = gpt()
    before = copy.deepcopy(module.state_dict())
    replica = parallelize(module, plan, Rank(0, 1, None).mesh(plan))
    with pytest.raises(JobError, match=f"{kind.__name__} cannot be stepped on one parameter after the other"):
        train(replica, kind(module.parameters(), lr=0.1), 1)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())
