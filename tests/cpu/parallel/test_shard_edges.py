"""What a shard axis does at its edges: small and scalar parameters, unused and frozen ones, faults, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import Micro
from torch import Tensor, nn

from shardwise.errors import JobError, NonFiniteLoss, SpecError
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.rows import Rows
from shardwise.parallel.step import evaluate, step
from shardwise.spec.layout import boxes
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes=SHAPES, ranks=st.integers(1, 5))
def test_rows_are_those_of_the_layout_and_come_back(shapes: list[tuple[int, ...]], ranks: int) -> None:
    rows = Rows(shapes, ranks)
    wholes = [torch.randn(shape) for shape in shapes]
    packed = torch.full((ranks * rows.size,), torch.nan)
    rows.pack(wholes, packed)
    assert not packed.isnan().any()
    back = [torch.full(shape, torch.nan) for shape in shapes]
    rows.unpack(packed, back)
    assert all(torch.equal(a, b) for a, b in zip(wholes, back, strict=True))
    plan = Plan(shard=ranks)
    for rank, piece in enumerate(packed.view(ranks, rows.size)):
        owns = [rows.own(index, whole, rank) for index, whole in enumerate(wholes)]
        again = torch.zeros(rows.size)
        rows.pack_own(owns, again)
        assert torch.equal(again, piece)
        for own, view, whole in zip(owns, rows.views(piece, rank), wholes, strict=True):
            held = boxes("model/w", tuple(whole.shape), plan, rank)
            expected = whole[held[0].slices] if held else whole.new_empty(0)
            assert torch.equal(own, view)
            assert torch.equal(own.flatten(), expected.flatten())


class Odd(nn.Module):
    """A scalar, a vector of one element, more ranks than rows, a branch for some samples only, a block nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.blocks[2].requires_grad_(False)
        self.branch = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs
        for block in self.blocks:
            x = block(x).tanh()
        if float(inputs[0, 0]) > 0:
            x = x + self.branch(x)
        out: Tensor = self.head(x) * self.gain + self.shift
        return out


def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return output.square().sum() + output.sum(), output.new_tensor(float(len(output)))


def batch(number: int, place: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(10 * number + place)
    inputs = torch.randn(3, 5, generator=g)
    inputs[0, 0] = inputs[0, 0].abs() * (1 if place == 0 else -1)  # only rank 0 goes through the branch
    return {"inputs": inputs}


def learned(rank: Rank, plan: Plan, places: int) -> Any:
    """Losses and norms of some steps, between which a block is thawed, and the parameters in the end."""
    torch.manual_seed(4)
    mesh = rank.mesh(plan)
    replica = parallelize(Odd(), plan, mesh)
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=0.05)
    own = range(places) if plan.ranks == 1 else [mesh.axis("batch").rank]
    curve = []
    for number in range(6):
        if number == 3:
            for name, p in replica.module.named_parameters():
                p.requires_grad_("blocks.0" not in name)
        micro = [Micro(batch(number, place), 0) for place in own]
        result = step(replica, [optimizer], micro, loss=loss, clip_norm=1.0)
        curve.append((result.loss, result.grad_norm))
    idle = [name for name, p in replica.module.named_parameters() if p in optimizer.state and "unused" in name]
    replica.gather()
    replica.close()
    return curve, {name: p.detach().clone() for name, p in replica.module.named_parameters()}, idle


@pytest.mark.parametrize("fields", [{"shard": 2, "zero": 1}, {"shard": 3, "zero": 2}, {"shard": 3, "zero": 3}])
def test_odd_parameters_are_trained_like_by_one_process(fields: dict[str, int]) -> None:
    plan = Plan(precision="float64", **fields)
    curve, values, _ = run_ranks(1, learned, Plan(precision="float64"), plan.ranks)[0]
    for here, mine, idle in run_ranks(plan.ranks, learned, plan, plan.ranks):
        assert torch.tensor(here).allclose(torch.tensor(curve), rtol=1e-9)
        assert not idle
        for name, value in values.items():
            assert torch.allclose(mine[name], value, rtol=1e-9), name


def blocks() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))


class Watched(nn.Linear):
    """Calls `look` where it computes, forward and backward."""

    look: Callable[..., Any]

    def forward(self, x: Tensor) -> Tensor:
        self.look()
        found: Tensor = super().forward(x)
        if found.requires_grad:
            found.register_hook(self.look)
        return found


def resident(rank: Rank, zero: int) -> dict[str, int]:
    """Bytes that a rank has: parameters at rest, the most while it computes, gradients after backward, states."""
    plan = Plan(shard=rank.world, zero=zero)
    replica = parallelize(nn.Sequential(*(Watched(64, 64) for _ in range(8))), plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=0.01)
    found = {"peak": 0, "gradients": 0}

    def whole() -> int:
        units = replica.units.each if replica.units else []
        return sum(cut.whole.untyped_storage().nbytes() for unit in units for cut in unit.cuts)

    def look(*_: Any) -> None:
        found["peak"] = max(found["peak"], whole())

    def count(*_: Any) -> None:
        grads = [p.grad for p in replica.module.parameters()]
        found["gradients"] = sum(grad.nbytes for grad in grads if grad is not None)

    for layer in replica.module.modules():
        if isinstance(layer, Watched):
            layer.look = look
    optimizer.register_step_pre_hook(count)
    step(replica, [optimizer], [Micro({"input": torch.ones(2, 64)}, 0)] * 2, loss=loss)
    found["states"] = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    found["parameters"] = sum(p.nbytes for p in replica.module.parameters())
    found["whole"] = whole()
    return found


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_rank_has_its_rows_and_what_it_computes_with(zero: int) -> None:
    block = (64 * 64 + 64) * 4
    for found in run_ranks(2, resident, zero):
        assert found["states"] == 2 * 8 * block // 2
        assert found["gradients"] == 8 * block // 2
        assert found["parameters"] == 8 * block // (2 if zero == 3 else 1)
        assert found["whole"] == 0
        assert found["peak"] <= 2 * block
        assert (found["peak"] > 0) == (zero == 3)


def poisoned(rank: Rank, zero: int) -> str:
    plan = Plan(shard=rank.world, zero=zero)
    replica = parallelize(blocks(), plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(replica.module.parameters(), lr=0.1)
    before = [p.detach().clone() for p in replica.module.parameters()]
    bad = torch.full((2, 64), torch.nan if rank.rank else 1.0)
    with pytest.raises(NonFiniteLoss) as caught:
        step(replica, [optimizer], [Micro({"input": bad}, 0)], loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(before, replica.module.parameters(), strict=True))
    step(replica, [optimizer], [Micro({"input": torch.ones(2, 64)}, 0)], loss=loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, replica.module.parameters(), strict=True))
    return str(caught.value)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_loss_that_is_not_a_number_is_an_error_on_every_rank_and_changes_nothing(zero: int) -> None:
    assert all("the loss is nan on rank 1" in said for said in run_ranks(2, poisoned, zero))


def failing(rank: Rank, zero: int, kind: str) -> str:
    plan = Plan(shard=rank.world, zero=zero)
    module = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4)) if kind == "sparse" else blocks()
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer: Any = torch.optim.SGD(replica.module.parameters(), lr=0.1)
    if kind == "whole":
        optimizer = torch.optim.Adafactor(replica.module.parameters(), lr=0.1)
    given = torch.arange(4) if kind == "sparse" else torch.ones(2, 64)
    with pytest.raises(JobError) as caught:
        step(replica, [optimizer], [Micro({"input": given}, 0)], loss=loss)
    return str(caught.value)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "said"), [("whole", "the optimizer Adafactor does not update a part"), ("sparse", "sparse")]
)
def test_what_rows_cannot_do_is_refused(kind: str, said: str, zero: int) -> None:
    assert all(said in each for each in run_ranks(2, failing, zero, kind))


def unlike(rank: Rank, counts: list[int]) -> Any:
    plan = Plan(shard=rank.world, zero=3)
    replica = parallelize(blocks(), plan, rank.mesh(plan))
    g = torch.Generator().manual_seed(rank.rank)
    held_out = [{"input": torch.randn(2, 64, generator=g)} for _ in range(counts[rank.rank])]
    try:
        return evaluate(replica, held_out, loss)["loss"], [b["input"].tolist() for b in held_out]
    except JobError as error:
        return str(error)


def test_ranks_with_fewer_batches_to_evaluate_go_along_and_count_each_once() -> None:
    found = run_ranks(2, unlike, [3, 1])
    inputs = torch.cat([torch.tensor(one) for _, held_out in found for one in held_out])
    total, weight = loss(blocks()(inputs), {})
    for value, _ in found:
        assert value == pytest.approx(float(total.detach() / weight), rel=1e-5)
    assert all("at least one batch of evaluation data" in said for said in run_ranks(2, unlike, [2, 0]))


def combined(rank: Rank, plan: Plan, how: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parallelize(blocks(), plan, rank.mesh(plan), **how)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "zero", "said"),
    [({"coupled": "gather"}, 2, "coupled='gather' does not go with zero=2"), ({"compile": True}, 3, "zero=3")],
)
def test_what_does_not_go_together_is_refused(how: dict[str, Any], zero: int, said: str) -> None:
    assert all(said in each for each in run_ranks(2, combined, Plan(shard=2, zero=zero), how))


class Stacked(nn.Module):
    """Recurrent layers keep a list of their own of their weights; forwards of the user's own stay."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(4, 4) for _ in range(2))
        inner = self.layers[0].forward
        self.layers[0].forward = lambda x: inner(x)  # type: ignore[method-assign]

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)[0]
        return inputs


def recurrent(rank: Rank, plan: Plan) -> list[float]:
    torch.manual_seed(3)
    replica = parallelize(Stacked(), plan, rank.mesh(plan))
    kept: Callable[..., Any] = vars(replica.module.layers[0])["forward"]  # type: ignore[index]
    optimizer = torch.optim.SGD(replica.module.parameters(), lr=0.1)
    found = []
    for number in range(3):
        places = range(2) if plan.ranks == 1 else [rank.rank]
        micro = [Micro({"inputs": torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(p + number))}, 0)
                 for p in places]  # fmt: skip
        found.append(step(replica, [optimizer], micro, loss=loss).loss)
    replica.close()
    assert (vars(replica.module.layers[0])["forward"] is kept) == (replica.units is None)  # type: ignore[index]
    assert "forward" not in vars(replica.module.layers[1])  # type: ignore[index]
    return found


def test_recurrent_layers_compute_with_the_whole_weights() -> None:
    expected = run_ranks(1, recurrent, Plan())[0]
    for found in run_ranks(2, recurrent, Plan(shard=2, zero=3)):
        assert found == pytest.approx(expected, rel=1e-5)


def looping(rank: Rank, zero: int) -> list[str]:
    replica = parallelize(blocks(), plan := Plan(shard=2, zero=zero), rank.mesh(plan))
    with pytest.raises(SpecError) as synchronising:
        replica.synchronise()
    with pytest.raises(SpecError) as accumulating, replica.no_sync():
        pass
    return [str(synchronising.value), str(accumulating.value)]


@pytest.mark.parametrize("zero", [2, 3])
def test_a_loop_of_the_user_s_own_is_refused(zero: int) -> None:
    assert all("a loop that calls backward itself" in said for both in run_ranks(2, looping, zero) for said in both)
