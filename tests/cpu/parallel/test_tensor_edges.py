"""Modules whose code does more than compute: split over two ranks they are still what one process computes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise import events
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.tensor import unit
from shardwise.parallel.tensor.find import Found, find_splits
from shardwise.parallel.tensor.prove import compare
from shardwise.spec.plan import Plan
from tests.ranks import Rank, RankFailed, run_ranks

WORDS, WIDTH = 32, 8
Loss = Callable[[nn.Module, Tensor], Tensor]
Change = Callable[[nn.Module], Any]


def tokens(seed: int, length: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (2, length), generator=torch.Generator().manual_seed(seed))


SHORT: tuple[Tensor, ...] = (tokens(0), tokens(1))
LONGER: tuple[Tensor, ...] = (tokens(0), tokens(1, 7))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = None if tied else nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.T if self.head is None else self.head(x)


def entropy(scores: Tensor, batch: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), batch.flatten())


def plain(model: nn.Module, batch: Tensor) -> Tensor:
    return entropy(model(batch), batch)


class Remembers(Block):
    """Hands an auxiliary loss to its parent in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        self.extra = hidden.square().mean()
        return x + self.down(F.gelu(hidden))


def with_extra(model: Any, batch: Tensor) -> Tensor:
    return plain(model, batch) + sum(block.extra for block in model.blocks)


class Averages(Block):
    """Puts another tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return super().forward(x - self.mean)


class AveragesInPlace(Averages):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return Block.forward(self, x - self.mean)


class Counts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(x * len(self.calls))


class Skips(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if random.random() < 0.5 else x


class Drops(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.up(x)))


class Scales(Block):
    """Reads a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class GatesLonger(Block):
    """Computes a gate without gradients, in a path that the proof did not see."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 5:
            return super().forward(x)
        with torch.no_grad():
            gate = self.up(x).tanh()
        return x + self.down(self.up(x) * gate)


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.linspace(0, 1, length, dtype=torch.float64)[:, None]


class Caches(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * table(x.shape[1]).to(x.dtype))


class Ties(nn.Module):
    """Two layers of one weight; longer inputs take a path that no graph is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()
        self.b.up.weight, self.b.down.weight = self.a.up.weight, self.a.down.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 5 and float(x.detach().sum()) > -1e9:
            return self.b(self.a(x)) * 1.0
        return self.b(self.a(x))


class TiesSorted(Ties):
    """Longer inputs take a path that no rule takes."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if x.shape[1] == 5 else found + self.a.up(x).sort(-1).values.sum(-1, keepdim=True)


class Direct(Block):
    """Reads its layers' weights itself, where no graph is made of it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 5 and float(x.detach().sum()) < -1e9:
            x = x + 1
        hidden = F.gelu(F.linear(x, self.up.weight, self.up.bias))
        return x + F.linear(hidden, self.down.weight, self.down.bias)


class Attends(nn.Module):
    """Attention with dropout; a row of a longer input may look nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (4, 2)).transpose(1, 2) for one in self.inner(x).chunk(3, -1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if x.shape[1] > 5:
            mask[0] = False
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.2)
        return x + self.out(found.transpose(1, 2).flatten(2))


class Writes(Block):
    """Changes its argument and returns nothing."""

    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        x += self.down(F.relu(self.up(x * 1)))


class OfWrites(Model):
    def __init__(self) -> None:
        super().__init__(Writes)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.embed(batch) * 1
        for block in self.blocks:
            block(x)
        assert self.head is not None
        return self.head(x)


class Rolls(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.roll(self.up(x), 1))


class Narrows(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        if x.shape[1] > 5:
            hidden = torch.cat([hidden.narrow(-1, -4, 4), hidden.narrow(-1, 0, 12)], -1)
        return x + self.down(hidden)


class Penalised(Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Tensor) -> Tensor:
        self.inner = x = self.first(self.embed(batch))
        for block in self.blocks:
            x = block(x)
        assert self.head is not None
        return self.head(x)


def penalty(model: Any, batch: Tensor) -> Tensor:
    """Has a gradient of a gradient."""
    loss = plain(model, batch)
    (grad,) = torch.autograd.grad(loss, model.inner, create_graph=True)
    return loss + 100 * grad.square().sum()


def hooked() -> nn.Module:
    model: Any = Model()
    model.seen = []
    for block in model.blocks:
        block.up.register_forward_hook(lambda _, args, output: model.seen.append(output))
    return model  # type: ignore[no-any-return]


def of_hooks(model: Any, batch: Tensor) -> Tensor:
    model.seen.clear()
    return plain(model, batch) + sum(one.square().mean() for one in model.seen)


class OwnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor) -> Tensor:
        chances = scores.softmax(-1)
        ctx.save_for_backward(chances, target)
        return -chances.gather(-1, target[:, None]).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        chances, target = ctx.saved_tensors
        found = chances.clone()
        found[torch.arange(len(target)), target] -= 1
        return grad * found / len(target), None


def own_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return OwnLoss.apply(model(batch).flatten(0, 1), batch.flatten())  # type: ignore[no-any-return]


def few(model: nn.Module, batch: Tensor) -> Tensor:
    return entropy(model(batch), batch % 16)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    batches: tuple[Tensor, ...] = SHORT
    loss: Loss = plain
    before_last: Change | None = None


def quietly(model: Any) -> None:
    for block in model.blocks:
        block.drop.eval()


def lower(model: Any) -> None:
    for block in model.blocks:
        block.drop.p = 0.1


def rescale(model: Any) -> None:
    model.blocks[0].scale = torch.tensor(3.0, dtype=torch.float64)
    model.blocks[1].scale.fill_(0.5)


def forget(model: nn.Module) -> None:
    table.cache_clear()


CASES = {
    "a head that is the table's transpose": Case(lambda: Model(tied=True), loss=few),
    "an auxiliary loss in an attribute": Case(lambda: Model(Remembers), loss=with_extra),
    "a buffer that is replaced": Case(lambda: Model(Averages)),
    "a buffer that is written": Case(lambda: Model(AveragesInPlace)),
    "a list that grows": Case(lambda: Model(Counts)),
    "layers dropped by Python's generator": Case(lambda: Model(Skips)),
    "a part put in eval mode": Case(lambda: Model(Drops), before_last=quietly),
    "another chance of dropout": Case(lambda: Model(Drops), before_last=lower),
    "a tensor in an attribute": Case(lambda: Model(Scales), before_last=rescale),
    "no gradients inside": Case(lambda: Model(GatesLonger), LONGER),
    "a cache of functools": Case(lambda: Model(Caches), LONGER, before_last=forget),
    "ties where no graph is made": Case(lambda: Model(Ties), LONGER),
    "ties where no rule is": Case(lambda: Model(TiesSorted), LONGER),
    "weights of other modules": Case(lambda: Model(Direct), LONGER),
    "a row that looks nowhere": Case(lambda: Model(Attends), LONGER),
    "an argument that is written": Case(OfWrites),
    "a roll over all dims": Case(lambda: Model(Rolls)),
    "a narrow from the end": Case(lambda: Model(Narrows), LONGER),
    "a gradient's gradient": Case(Penalised, loss=penalty),
    "hooks inside": Case(hooked, loss=of_hooks),
    "a loss with a gradient of its own": Case(Model, loss=own_loss),
}
Step = tuple[float, dict[str, Tensor]]


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().double()


def steps(case: Case, model: nn.Module, whole: Callable[[str, Tensor], Tensor]) -> list[Step]:
    """The loss, and every gradient and buffer, of each batch."""
    found = []
    for number, batch in enumerate(case.batches):
        if case.before_last is not None and number == len(case.batches) - 1:
            case.before_last(model)
        model.zero_grad()
        torch.manual_seed(1)
        random.seed(number)
        loss = case.loss(model, batch)
        loss.backward()
        tensors = {
            n: whole(n, p.grad if p.grad is not None else torch.zeros_like(p)) for n, p in model.named_parameters()
        }
        tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        found.append((loss.item(), {name: tensor.detach().clone() for name, tensor in tensors.items()}))
    return found


def found_of(case: Case) -> Found:
    random.seed(0)
    return find_splits(made(case), case.batches[0], 2)


def on_a_rank(rank: Rank, plans: dict[str, Plan]) -> dict[str, list[Step]]:
    found = {}
    mesh = rank.mesh(next(iter(plans.values())))
    for name, plan in plans.items():
        model = made(CASES[name])
        tensors = parallelize(model, plan, mesh).tensors
        assert tensors is not None
        owned, links = tensors.owned, tensors.links
        found[name] = steps(
            CASES[name],
            model,
            lambda n, t: links.join(t, *owned[n]) if n in owned else t,  # noqa: B023
        )
    return found


@pytest.fixture(scope="module")
def split() -> list[dict[str, list[Step]]]:
    """What two ranks computed, of all cases."""
    plans = {n: Plan(tensor=2, precision="float64", splits=found_of(case).splits) for n, case in CASES.items()}
    return run_ranks(2, on_a_rank, plans)


def test_what_is_slow_is_said_once() -> None:
    case = CASES["a buffer that is replaced"]

    def on_a_rank(rank: Rank, plan: Plan) -> list[str]:
        model, said = made(case), []
        parallelize(model, plan, rank.mesh(plan))
        with events.sink(said.append):
            model(SHORT[0])
            model(LONGER[1])
        return [str(event["message"]) for event in said if event["event"] == "warning"]

    plan = Plan(tensor=2, precision="float64", splits=found_of(case).splits)
    (message,), others = run_ranks(2, on_a_rank, plan)
    assert message.startswith("Averages runs its own code")
    assert others == []


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_does(name: str, split: list[dict[str, list[Step]]]) -> None:
    expected = steps(CASES[name], made(CASES[name]), lambda n, t: t)
    for rank in split:
        for (loss, tensors), (ours, found) in zip(expected, rank[name], strict=True):
            assert ours == pytest.approx(loss, rel=1e-10)
            for each, tensor in tensors.items():
                torch.testing.assert_close(found[each], tensor, rtol=1e-8, atol=1e-10, msg=f"{each} of {name}")


def writes(scores: Tensor, how: str) -> Tensor:
    scores = scores * 1.0
    if how == "item":
        scores[..., 3] = -30.0
    elif how == "method":
        scores.masked_fill_(torch.arange(WORDS) < 3, -30.0)
    elif how == "operator":
        scores -= 1.0
    else:
        scores.transpose(0, 1).mul_(2)
    return scores


def write_on_a_rank(rank: Rank, plan: Plan, how: str) -> None:
    model = Model().double()
    parallelize(model, plan, rank.mesh(plan))
    entropy(writes(model(SHORT[0]), how), SHORT[0]).backward()


def outside_on_a_rank(rank: Rank, plan: Plan, what: str) -> None:
    model = Model().double()
    parallelize(model, plan, rank.mesh(plan))
    if what == "token":
        model(SHORT[0] + WORDS // 2)
    entropy(model(SHORT[0]), torch.where(SHORT[0] == SHORT[0][0, 0], WORDS + 8, SHORT[0]))


PLAN = functools.cache(lambda: Plan(tensor=2, precision="float64", splits=found_of(Case(Model)).splits))


@pytest.mark.parametrize("how", ["item", "method", "operator", "view"])
def test_a_write_into_cut_scores_is_refused(how: str) -> None:
    with pytest.raises(RankFailed, match="writes in place into scores|view and is being modified inplace"):
        run_ranks(2, write_on_a_rank, PLAN(), how)


@pytest.mark.parametrize("what", ["token", "target"])
def test_what_is_outside_of_the_vocabulary_is_refused(what: str) -> None:
    with pytest.raises(RankFailed, match="IndexError: (An index is none of the 32 rows|A target is none of the 32)"):
        run_ranks(2, outside_on_a_rank, PLAN(), what)


def half_on_a_rank(rank: Rank | None, plan: Plan) -> tuple[torch.dtype, float]:
    torch.manual_seed(0)
    model = Model()
    if rank is not None:
        parallelize(model, plan, rank.mesh(plan))
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(model, SHORT[0])
    return loss.dtype, loss.item()


def test_autocast_computes_a_loss_of_cut_scores_in_float32() -> None:
    plan = Plan(tensor=2, splits=PLAN().splits)
    alone = half_on_a_rank(None, plan)
    for dtype, loss in run_ranks(2, half_on_a_rank, plan):
        assert dtype is alone[0] is torch.float32
        assert loss == pytest.approx(alone[1], rel=1e-2)


def test_no_graph_is_tried_for_ever() -> None:
    case = CASES["a list that grows"]

    def on_a_rank(rank: Rank, plan: Plan) -> int:
        model = made(case)
        parallelize(model, plan, rank.mesh(plan))
        tried = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(unit, "capture", lambda module, *more: tried.append(module))
            for length in range(1, 20):
                model(tokens(0, length))
        return sum(isinstance(module, Counts) for module in tried)

    plan = Plan(tensor=2, precision="float64", splits=found_of(case).splits)
    assert run_ranks(2, on_a_rank, plan) == [2 * unit.TRIES] * 2


def test_zeros_that_are_alike_do_not_differ() -> None:
    zeros = {"output 0": torch.zeros(2)}
    assert compare(zeros, {"output 0": torch.zeros(2)})[0] == 0.0
    assert compare(zeros, {"output 0": torch.ones(2)})[0] == float("inf")


def test_splits_do_not_depend_on_the_order_of_gradients() -> None:
    expected = {
        "output 0": torch.tensor([float("nan")]),
        "gradient of w": torch.ones(1),
        "gradient of b": torch.ones(1),
    }
    for names in (list(expected), list(expected)[::-1]):
        gap, _ = compare({n: expected[n] for n in names}, {n: expected[n].clone() for n in names})
        assert gap == float("inf")
