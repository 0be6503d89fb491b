"""Recomputing activations: the same numbers as keeping them, fewer of them kept, and no second trace in the module."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import build
from jobs import Micro
from test_pipelined import cut, in_stages, made, micro
from test_pipelined import loss as counted
from torch import Tensor, nn

from shardwise.errors import JobError, SpecError
from shardwise.models.profile import profile
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.plan.support import SEVERAL_STAGES
from shardwise.spec.plan import Plan, Recompute
from tests.ranks import Rank, run_ranks

FULL, SELECTIVE, SOME = Recompute(mode="full"), Recompute(mode="selective"), Recompute(mode="blocks", blocks=(0, 2))
MODES = [FULL, SELECTIVE, SOME]


class Whimsical(nn.Module):
    """A block that draws from Python's random numbers too, and counts its own calls in what it computes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, gain: float) -> dict[str, Tensor]:
        self.calls += 1
        return {"x": x + torch.tanh(self.linear(x)) * gain * random.random() / self.calls}


class Chain(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(blocks))

    def forward(self, input: Tensor) -> Tensor:
        for block in self.blocks:
            found = block(input, gain=0.5) if isinstance(block, Whimsical) else block(input)
            input = found["x"] if isinstance(found, dict) else found
        return input


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))


def square(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return output.square().sum(), output.new_tensor(float(output.numel()))


def batches(number: int) -> list[Micro]:
    g = torch.Generator().manual_seed(number)
    return [Micro({"input": torch.randn(5, 6, generator=g)}, 7 * number + i) for i in range(2)]


def trained(rank: Rank, module: nn.Module, plan: Plan, steps: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    before = {name for name, part in module.named_modules() if "forward" in vars(part)}
    replica = parallelize(module, plan, rank.mesh(plan), batch_norm="local")
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    losses = [step(replica, [optimizer], batches(number), loss=square).loss for number in range(steps)]
    replica.close()
    assert {name for name, part in module.named_modules() if "forward" in vars(part)} == before
    return losses, module.state_dict()


@pytest.mark.parametrize("recompute", MODES, ids=lambda one: one.mode)
@pytest.mark.parametrize("block", [Whimsical, normed])
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_it_computes_the_same_bits(precision: Any, block: Callable[[], nn.Module], recompute: Recompute) -> None:
    torch.manual_seed(2)
    module = Chain(block)
    plain = run_ranks(1, trained, copy.deepcopy(module), Plan(precision=precision))[0]
    again = run_ranks(1, trained, module, Plan(precision=precision, recompute=recompute))[0]
    assert again[0] == plain[0]
    for name, value in plain[1].items():  # running statistics and counters too
        assert torch.equal(again[1][name], value), name


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=lambda one: one.mode)
def test_exact_runs_are_the_same_bits_on_two_ranks(recompute: Recompute) -> None:
    torch.manual_seed(2)
    found = {
        (ranks, how.mode): run_ranks(ranks, exactly, Plan(data=ranks, exact=True, recompute=how))[0]
        for ranks, how in ((1, Recompute()), (2, recompute))
    }
    first, second = found.values()
    assert first == second


def exactly(rank: Rank, plan: Plan) -> list[list[float]]:
    torch.manual_seed(2)
    module = Chain(normed)
    replica = parallelize(module, plan, rank.mesh(plan), batch_norm="local", logical_shards=2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for number in range(3):
        shards = [Micro(one.batch, one.stream, index) for index, one in enumerate(batches(number))]
        mine = shards if rank.world == 1 else [shards[rank.rank]]
        step(replica, [optimizer], mine, loss=square)
    return [t.detach().flatten().tolist() for t in module.state_dict().values()]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("dropout", "1f1b"),
        pytest.param("tied", "zbv", marks=pytest.mark.slow),
        pytest.param("encoder", "1f1b", marks=pytest.mark.slow),
        *(pytest.param("dropout", s, marks=pytest.mark.slow) for s in ("gpipe", "interleaved", "zero_bubble", "zbv")),
        pytest.param("resnet", "1f1b", marks=pytest.mark.slow),
    ],
)
def test_stages_recompute_under_every_schedule(name: str, schedule: str) -> None:
    virtual = 2 if schedule in SEVERAL_STAGES else 1
    count = 1 if name == "resnet" else 4
    plan = cut(name, Plan(precision="float64", microbatches=count, pipeline=2, schedule=schedule, virtual=virtual))
    kept = run_ranks(2, in_stages, name, plan, {})
    full = Plan(**{**{f: getattr(plan, f) for f in plan.__struct_fields__}, "recompute": FULL})
    for here, again in zip(kept, run_ranks(2, in_stages, name, full, {}), strict=True):
        assert again[0] == here[0]
        assert all(torch.equal(again[2][key], value) for key, value in here[2].items())


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps of a forward pass, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self.held: list[Tensor] = []
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self.seen:
            self.seen.add(tensor.untyped_storage()._cdata)
            self.held.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.held)


def test_full_keeps_less_than_a_part_and_that_less_than_all() -> None:
    def kept(recompute: Recompute) -> int:
        module = made("gpt")
        plan = Plan(recompute=recompute)
        replica = parallelize(module, plan, Rank(0, 1, None).mesh(plan))
        saved = Saved(module)
        with saved:
            module(micro("gpt", 1, 0, 0).batch["tokens"]).sum()
        replica.close()
        return saved.bytes

    everything, some, full, products = (kept(how) for how in (Recompute(), SOME, FULL, SELECTIVE))
    each = (everything - full) / 4  # what a block does not keep, of four alike
    assert everything - some == pytest.approx(2 * each, rel=0.05)
    found = profile(lambda: made("gpt"), micro("gpt", 1, 0, 0).batch)
    block = next(one for one in found.blocks if one.name == "blocks.1")
    assert each == pytest.approx(2 * (block.activation_bytes - block.boundary_bytes), rel=0.05)
    assert products == pytest.approx(full, rel=0.05), "outputs of products are kept by another hand"


def test_a_model_that_caches_its_keys_is_trained_without_the_cache() -> None:
    def gradients(recompute: Recompute) -> list[Tensor]:
        torch.manual_seed(1)
        module = build("llama").double()
        plan = Plan(precision="float64", recompute=recompute)
        replica = parallelize(module, plan, Rank(0, 1, None).mesh(plan))
        tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(3))
        module(input_ids=tokens).logits.square().sum().backward()
        found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        replica.close()
        assert module.config.use_cache  # type: ignore[union-attr]
        return found

    for kept, again in zip(gradients(Recompute()), gradients(FULL), strict=True):
        assert torch.equal(kept, again)


class Fickle(nn.Module):
    """A block that computes something of another shape each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.turn = nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return x + torch.tanh(self.linear(x.repeat(self.turn, 1)))[: len(x)]


def test_a_block_that_computes_something_else_the_second_time_is_an_error() -> None:
    plan = Plan(recompute=FULL)
    replica = parallelize(Chain(Fickle), plan, Rank(0, 1, None).mesh(plan))
    optimizer = torch.optim.SGD(replica.module.parameters(), lr=0.1)
    with pytest.raises(JobError, match="recompute"):
        step(replica, [optimizer], batches(0), loss=square)


@pytest.mark.parametrize(
    ("module", "plan", "how", "match"),
    [
        (lambda: nn.Linear(2, 2), Plan(recompute=FULL), {}, "no repeated blocks"),
        (lambda: Chain(normed), Plan(recompute=Recompute(mode="blocks", blocks=(4,))), {}, "numbers 0 to 3"),
        (lambda: Chain(normed), Plan(recompute=Recompute(mode="blocks")), {}, "needs their numbers"),
        (lambda: Chain(normed), Plan(recompute=FULL), {"compile": True}, "compile=True"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(
    module: Callable[[], nn.Module], plan: Plan, how: dict[str, Any], match: str
) -> None:
    with pytest.raises(SpecError, match=match):
        parallelize(module(), plan, Rank(0, 1, None).mesh(plan), **how)


def norms_in_step(rank: Rank, plan: Plan) -> str:
    with pytest.raises(SpecError, match="batch_norm='local'") as caught:
        parallelize(Chain(normed), plan, rank.mesh(plan))
    return str(caught.value)


def test_norms_over_all_ranks_are_not_recomputed() -> None:
    assert "'blocks.0'" in run_ranks(2, norms_in_step, Plan(data=2, recompute=FULL))[0]


def on_ranks(rank: Rank, name: str, plan: Plan) -> list[tuple[float, float]]:
    replica = parallelize(made(name), plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=0.01)
    found = []
    for number in range(3):
        result = step(replica, [optimizer], [micro(name, number, rank.rank, index) for index in range(2)], loss=counted)
        found.append((result.loss, result.grad_norm or 0.0))
    replica.close()
    return found


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("recompute", [FULL, pytest.param(SELECTIVE, marks=pytest.mark.slow)], ids=lambda one: one.mode)
def test_shards_recompute(zero: int, recompute: Recompute) -> None:
    kept = run_ranks(2, on_ranks, "dropout", Plan(precision="float64", shard=2, zero=zero))
    again = run_ranks(2, on_ranks, "dropout", Plan(precision="float64", shard=2, zero=zero, recompute=recompute))
    assert again == kept
