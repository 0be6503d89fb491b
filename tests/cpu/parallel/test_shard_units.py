"""Parts that are whole only while they compute (zero=3): whatever a module does with its parameters, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import Micro
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwise.errors import JobError
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import evaluate, step
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

WIDTH, STEPS = 6, 4


class Scale(nn.Module):
    """Multiplies by numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Adapted(nn.Module):
    """Frozen parts before and behind a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(WIDTH, WIDTH), Scale()
        self.trained, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for part in (self.first, self.scale, self.last):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.last(self.trained(self.scale(self.first(x))).tanh())
        return found


class Positions(nn.Module):
    """Gives its parameter as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.table


class Detached(nn.Linear):
    """Its weight is also used without a gradient for it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() + x @ self.weight.detach()


class Answer:
    """An object of the model's own."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Wrapped(nn.Linear):
    def forward(self, x: Any) -> Any:
        return Answer(super().forward(x.value if isinstance(x, Answer) else x).tanh())


class Mixed(nn.Module):
    """Two widths of number in one part."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.wide(self.narrow(x).tanh().double()).to(x.dtype)
        return found


class Net(nn.Module):
    """Blocks one after the other, each called as often as `times` says."""

    def __init__(self, blocks: list[nn.Module], *, times: int = 1, again: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.times, self.again = nn.ModuleList(blocks), times, again

    def forward(self, x: Tensor) -> Tensor:
        out: Any = x
        for block in self.blocks:
            for _ in range(self.times):
                if self.again is not None:
                    out = checkpoint(block, out, use_reentrant=self.again)
                elif isinstance(block, Positions):
                    out = out + block(out)
                else:
                    out = block(out)
        return out.value if isinstance(out, Answer) else out


class Nested(nn.Module):
    """Lists in lists, of which nobody calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels:
            for layer in level:  # type: ignore[union-attr]
                x = layer(x).tanh()
        return x


def linears(kind: type[nn.Module] = nn.Linear) -> list[nn.Module]:
    return [kind(WIDTH, WIDTH) for _ in range(3)]  # type: ignore[call-arg]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "adapted": lambda: Net([Adapted(), Adapted(), Adapted()]),
    "positions": lambda: Net([nn.Linear(WIDTH, WIDTH), Positions(), nn.Linear(WIDTH, WIDTH)]),
    "detached": lambda: Net(linears(Detached)),
    "objects": lambda: Net(linears(Wrapped)),
    "several times": lambda: Net(linears(), times=3),
    "computed again": lambda: Net(linears(), times=2, again=False),
    "mixed": lambda: Net([Mixed(), Mixed()]),
    "nested": Nested,
}


def loss(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return output.square().sum(), output.new_tensor(float(len(output)))


def batch(number: int, place: int) -> dict[str, Tensor]:
    return {"x": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * number + place))}


def learned(rank: Rank, name: str, plan: Plan, places: int) -> list[tuple[float, float | None]]:
    torch.manual_seed(6)
    replica = parallelize(MODELS[name](), plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW([p for p in replica.module.parameters() if p.requires_grad], lr=0.05)
    own = range(places) if plan.ranks == 1 else [rank.rank]
    curve = []
    for number in range(STEPS):
        micro = [Micro(batch(number, place), 0) for place in own for _ in range(2)]
        result = step(replica, [optimizer], micro, loss=loss)
        curve.append((result.loss, result.grad_norm))
        assert not any(unit.opened for unit in (replica.units.each if replica.units else []))
    return curve


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_use_of_parameters_trains_like_one_process(name: str, zero: int) -> None:
    plain = Plan() if name == "mixed" else Plan(precision="float64")
    plan = Plan(shard=2, zero=zero, precision=plain.precision)
    expected = torch.tensor(run_ranks(1, learned, name, plain, 2)[0])
    for found in run_ranks(2, learned, name, plan, 2):
        assert torch.tensor(found).allclose(expected, rtol=1e-5 if name == "mixed" else 1e-9)


class Reads(Net):
    """Takes a block's weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.blocks[0].weight.mean()  # type: ignore[operator,union-attr]


class Unlike(nn.Module):
    """Every rank calls its blocks in an order of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.blocks, self.order = nn.ModuleList(linears()), [rank, 1 - rank, 2]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.blocks[index](x).tanh()
        return x


def hooked() -> nn.Module:
    net = Net(linears())
    net.blocks[0].weight.register_hook(lambda grad: grad * 2)  # type: ignore[union-attr,operator]
    return net


FAULTS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "reads": (lambda rank: Reads(linears()), "reads 'blocks.0.weight' outside of the part"),
    "unlike": (Unlike, "called parts of the model in unlike orders"),
    "hooked": (lambda rank: hooked(), "'blocks.0.weight' has a hook"),
    "reentrant": (lambda rank: Net(linears(), times=2, again=True), "use_reentrant=False"),
}


def refused(rank: Rank, name: str) -> str:
    torch.manual_seed(6)
    plan = Plan(shard=2, zero=3)
    try:
        replica = parallelize(FAULTS[name][0](rank.rank), plan, rank.mesh(plan))
        optimizer = torch.optim.SGD(replica.module.parameters(), lr=0.1)
        given = {"x": batch(0, rank.rank)["x"].requires_grad_(name == "reentrant")}
        step(replica, [optimizer], [Micro(given, 0)], loss=loss)
    except JobError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", FAULTS)
def test_what_would_compute_with_other_numbers_is_refused_on_every_rank(name: str) -> None:
    assert all(FAULTS[name][1] in said for said in run_ranks(2, refused, name))


class Gained(nn.Module):
    """Two parameters without a dimension, of which one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.gain, self.idle = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) * self.gain
        return found


def gained(rank: Rank, zero: int) -> tuple[float, float]:
    plan = Plan(shard=2, zero=zero)
    torch.manual_seed(6)
    replica = parallelize(Gained(), plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=0.1, weight_decay=0.5)
    for number in range(3):
        step(replica, [optimizer], [Micro(batch(number, rank.rank), 0)], loss=loss)
    return float(replica.module.gain.detach()), float(replica.module.idle.detach())  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_parameter_that_nobody_uses_is_not_stepped(zero: int) -> None:
    for gain, idle in run_ranks(2, gained, zero):
        assert gain != 1.5
        assert idle == 2.0


def from_state(rank: Rank, zero: int) -> list[float]:
    """An optimizer that was built, with its states, before the module was cut."""
    torch.manual_seed(6)
    net = Net(linears())
    optimizer = torch.optim.Adagrad(net.parameters(), lr=0.1)
    plan = Plan(shard=rank.world, zero=zero)
    replica = parallelize(net, plan, rank.mesh(plan))
    places = range(2) if rank.world == 1 else [rank.rank]
    return [step(replica, [optimizer], [Micro(batch(n, p), 0) for p in places], loss=loss).loss for n in range(3)]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_that_are_there_already_are_cut(zero: int) -> None:
    expected = run_ranks(1, from_state, 3)[0]
    assert all(found == pytest.approx(expected, rel=1e-5) for found in run_ranks(2, from_state, zero))


def warming(rank: Rank) -> str:
    plan = Plan(shard=2, zero=1)
    replica = parallelize(Net(linears()), plan, rank.mesh(plan))
    optimizer = torch.optim.Adafactor(replica.module.parameters(), lr=0.0)
    with pytest.raises(JobError) as caught:
        step(replica, [optimizer], [Micro(batch(0, rank.rank), 0)], loss=loss)
    return str(caught.value)


def test_an_optimizer_whose_rate_is_still_zero_is_tried_all_the_same() -> None:
    assert all("Adafactor does not update a part" in said for said in run_ranks(2, warming))


def tensors(rank: Rank) -> float:
    plan = Plan(shard=2, zero=3)
    replica = parallelize(nn.Sequential(*linears()), plan, rank.mesh(plan))
    return evaluate(replica, [torch.ones(2, WIDTH)] * (2 - rank.rank), lambda out, x: (out.sum(), out.new_tensor(2.0)))[
        "loss"
    ]


def test_batches_may_be_tensors_in_evaluation() -> None:
    first, second = run_ranks(2, tensors)
    assert first == second
