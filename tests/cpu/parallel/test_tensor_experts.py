"""Mixtures of experts over the tensor axis, expert by expert: loss and gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import Micro
from msgspec import structs
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.checkpoint.store import LocalStore
from shardwise.errors import SpecError
from shardwise.models.cuts import profile_calls
from shardwise.models.inputs import call
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.parallel.tensor.find import find_splits
from shardwise.parallel.tensor.links import GroupLinks, gathered
from shardwise.plan.stages import with_stages
from shardwise.spec.plan import Plan, Recompute, Split
from shardwise.spec.profile import ModelProfile
from shardwise.train.state import Saver, State
from tests.ranks import Rank, run_ranks

WIDTH, WORDS, STEPS, MICROS = 16, 61, 4, 2
CLIP, CLOSE = 0.3, 1e-8
ROUNDED = 1e-6  # published models have norms and routers in float32, whatever their parameters are


class Expert(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, inner), nn.Linear(inner, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x))))


class Chosen(nn.Module):
    """The best two experts of a list for each token, a shared one, a residual, and the router's probabilities."""

    def __init__(self, experts: int, idle: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(Expert(WIDTH, 24, dropout) for _ in range(experts))
        self.shared = Expert(WIDTH, 32)
        if idle:
            with torch.no_grad():
                self.router.bias[-idle:] = -100.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, WIDTH)
        odds = self.router(rows).softmax(-1)
        weights, chosen = odds.topk(2, -1)
        total = self.shared(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if token.numel():
                total = total.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return x + total.view_as(x), odds


class Tables(nn.Module):
    """All experts at once, by products of a batch; router, biases and a residual beside them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, WIDTH))
        self.up, self.up_bias = (
            nn.Parameter(0.2 * torch.randn(experts, WIDTH, 24)),
            nn.Parameter(torch.zeros(experts, 24)),
        )
        self.down, self.down_bias = (
            nn.Parameter(0.2 * torch.randn(experts, 24, WIDTH)),
            nn.Parameter(torch.zeros(experts, WIDTH)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, WIDTH)
        odds = (rows @ self.router.T).softmax(-1)
        inner = F.gelu(torch.bmm(rows.expand(len(self.router), -1, -1), self.up) + self.up_bias[:, None])
        every = torch.bmm(inner, self.down) + self.down_bias[:, None]
        return x + torch.einsum("etd,te->td", every, odds).view_as(x), odds


class Block(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.mlp, self.norm, self.mixture = Expert(WIDTH, 32), nn.LayerNorm(WIDTH), mixture

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.mlp(x)
        found, odds = self.mixture(self.norm(x))
        return x + found, odds


class Model(nn.Module):
    def __init__(self, mixture: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.blocks = nn.ModuleList(Block(mixture()) for _ in range(2))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x, odds = self.embed(input_ids), []
        for block in self.blocks:
            x, one = block(x)
            odds.append(one)
        balance = torch.stack([one.square().sum(-1) for one in odds]).sum(0)  # for an auxiliary loss of the routers
        return {"logits": self.head(x), "balance": balance.view_as(input_ids)}


class Whispers(Chosen):
    """It leaves a loss in an attribute."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, odds = super().forward(x)
        self.left = odds.square().sum()
        return found, odds


class Bent(Chosen):
    """What its experts give together goes through something that is not linear."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, odds = super().forward(x)
        return found.tanh(), odds


def published(kind: str, **told: Any) -> nn.Module:
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": WORDS, "max_position_embeddings": 64, "intermediate_size": 24}
    config = getattr(transformers, f"{kind}Config")(**{"experts_implementation": "eager"} | sizes | told)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


QWEN = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Model(lambda: Chosen(5)),
    "idle": lambda: Model(lambda: Chosen(4, idle=2)),
    "tables": lambda: Model(lambda: Tables(5)),
    "mixtral": lambda: published("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: published("Qwen2Moe", **QWEN),
    "chance": lambda: Model(lambda: Chosen(4, dropout=0.3)),
    "whispers": lambda: Model(lambda: Whispers(4)),
    "bent": lambda: Model(lambda: Bent(4)),
    "gpt_oss": lambda: published("GptOss", num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2),
    "olmoe": lambda: published("Olmoe", num_experts=4, num_experts_per_tok=2),
    "grouped": lambda: published("Mixtral", num_local_experts=4, experts_implementation="grouped_mm"),
    "batched": lambda: published("Mixtral", num_local_experts=5, experts_implementation="batched_mm"),
}
EXACT = ("list", "idle", "tables")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on several threads wait for one another longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(name: str) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[name]().double()


def micro(number: int, place: int, index: int) -> Micro:
    g = torch.Generator().manual_seed(100 * number + 10 * place + index)
    words = torch.randint(0, WORDS, (2, 7 + number % 3), generator=g)
    return Micro({"input_ids": words, "targets": words.roll(-1, 1)}, number)


def loss(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scores, targets = output["logits"], batch["targets"]
    total = F.cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction="sum")
    if "balance" in output:
        total = total + 3 * output["balance"].sum()
    return total, scores.new_tensor(float(targets.numel()))


Curve = list[tuple[float, dict[str, Tensor]]]


def alone(name: str, places: int = 1) -> tuple[Curve, dict[str, Tensor]]:
    """One process: losses and clipped gradients of each step, and the parameters after all."""
    module = made(name)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-3)
    curve = []
    for number in range(STEPS):
        optimizer.zero_grad()
        total, weight = torch.zeros(()), torch.zeros(())
        for place in range(places):
            for index in range(MICROS):
                one = micro(number, place, index).batch
                found = loss(call(module, one), one)
                total, weight = total + found[0], weight + found[1]
        (total / weight).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        curve.append(
            ((total / weight).item(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        )
        optimizer.step()
    return curve, module.state_dict()


def ranked(rank: Rank, name: str, plan: Plan) -> Any:
    mesh = rank.mesh(plan)
    module = made(name)
    replica = parallelize(module, plan, mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-3)
    place = mesh.axis("batch").rank
    tensors = replica.tensors
    assert tensors is not None
    held = {n: tuple(p.shape) for n, p in module.named_parameters()}
    grads: dict[str, Tensor] = {}

    def seen(*_: Any) -> None:
        named = module.named_parameters() if plan.shard == plan.pipeline == 1 else ()
        grads.update({n: whole_grad(n, p, tensors.owned, tensors.links) for n, p in named})

    optimizer.register_step_pre_hook(seen)
    curve = []
    for number in range(STEPS):
        share = [micro(number, place, index) for index in range(MICROS)]
        result = step(replica, [optimizer], share, loss=loss, clip_norm=CLIP)
        curve.append((result.loss, dict(grads)))
    tested = None
    if plan.pipeline == 1:
        with torch.no_grad(), replica.working():
            tested = call(module.eval(), micro(50, 0, 0).batch)["logits"] + 0  # whole
    replica.gather()
    replica.close()
    return curve, dict(module.state_dict()), held, tested


def whole_grad(name: str, p: Tensor, owned: Any, links: GroupLinks) -> Tensor:
    grad = p.grad if p.grad is not None else torch.zeros_like(p)
    return gathered(grad, links, *owned[name]) if name in owned else grad.clone()


def splits(name: str, ranks: int, **asked: Split) -> dict[str, Split]:
    return find_splits(made(name), micro(0, 0, 0).batch, ranks, asked=asked).splits


def compare(name: str, **fields: Any) -> list[Any]:
    plan = Plan(precision="float64", microbatches=MICROS, splits=splits(name, fields["tensor"]), **fields)
    assert any(split.how == "experts" for split in plan.splits.values())
    curve, values = alone(name, plan.replicas)
    close = CLOSE if name in EXACT else ROUNDED
    module = made(name)
    module.load_state_dict(values)
    tested = call(module.eval(), micro(50, 0, 0).batch)["logits"].detach()
    found = run_ranks(plan.ranks, ranked, name, plan)
    for here, values_here, _, tested_here in found:
        for (a, grads), (b, grads_here) in zip(curve, here, strict=True):
            assert b == pytest.approx(a, rel=close)
            floor = 1e-6 * max(float(grad.norm()) for grad in grads.values())
            for key, grad in grads_here.items():
                expected = grads.get(key, torch.zeros_like(grad))
                assert float((grad - expected).norm()) <= close * max(float(expected.norm()), floor), key
        for key, value in values.items():
            assert torch.allclose(values_here[key], value, rtol=10 * close, atol=0.01 * close), key
        assert tested_here is None or float((tested_here - tested).norm()) <= 10 * close * float(tested.norm())
    return found


TRAINED = ["list", "idle", "tables", "mixtral", "qwen2_moe", "gpt_oss", "olmoe", "batched"]


def slow(names: list[str], quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow(TRAINED, ("list", "tables", "mixtral", "qwen2_moe")))
def test_two_ranks_train_like_one_process(name: str) -> None:
    found = compare(name, tensor=2)
    sizes = [sum(torch.Size(shape).numel() for shape in held.values()) for _, _, held, _ in found]
    whole = sum(p.numel() for p in made(name).parameters())
    assert max(sizes) < 0.75 * whole


@pytest.mark.parametrize("name", slow(["idle", "tables", "mixtral", "list"], ("idle",)))
def test_four_experts_on_three_ranks(name: str) -> None:
    compare(name, tensor=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list", "idle", "tables", "qwen2_moe"])
@pytest.mark.parametrize(
    "fields",
    [
        {"data": 2},
        {"shard": 2, "zero": 1},
        {"shard": 2, "zero": 3},
        {"recompute": Recompute(mode="full")},
        {"recompute": Recompute(mode="selective")},
    ],
    ids=str,
)
def test_with_other_axes_and_computed_again(name: str, fields: dict[str, Any]) -> None:
    compare(name, tensor=2, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["list", "tables", "mixtral"])
def test_stages_of_tensor_ranks(name: str) -> None:
    calls = profile_calls(lambda: made(name), micro(0, 0, 0).batch, loss=loss)
    bare = Plan(precision="float64", microbatches=MICROS, tensor=2, pipeline=2)
    staged = with_stages(bare, ModelProfile(blocks=(), calls=calls), lambda _, a, b: float(b - a + 1))
    compare(name, tensor=2, pipeline=2, stages=staged.stages, blocks=staged.blocks)


def continued(rank: Rank, name: str, plan: Plan, place: str, steps: tuple[int, int]) -> list[float]:
    """Go on from the checkpoint in `place`, if there is one, through `steps`, and save."""
    mesh = rank.mesh(plan)
    replica = parallelize(made(name), plan, mesh)
    optimizers: Any = SimpleNamespace(optimizers=[torch.optim.AdamW(replica.module.parameters(), lr=0.01)])
    job: Any = SimpleNamespace(keep_last=2)
    saver = Saver(None, mesh, job)
    saver.store, saver.kept = LocalStore(Path(place)), True
    assert saver.resume(replica, optimizers).step == steps[0]
    losses = []
    for number in range(*steps):
        share = [micro(number, 0, index) for index in range(MICROS)]
        losses.append(step(replica, optimizers.optimizers, share, loss=loss, clip_norm=CLIP).loss)
    saver.save(replica, optimizers, State(step=steps[1], loss=losses[-1]), best=False)
    return losses


@pytest.mark.parametrize("name", slow(["list", "tables", "idle"], ("list",)))
def test_a_checkpoint_goes_to_one_rank_and_back(name: str, tmp_path: Path) -> None:
    one = Plan(precision="float64", microbatches=MICROS)
    several = structs.replace(one, tensor=2, splits=splits(name, 2))
    expected = run_ranks(1, continued, name, one, str(tmp_path / "whole"), (0, 6))[0]
    place = str(tmp_path / "moved")
    for plan, steps in ((several, (0, 2)), (one, (2, 4)), (several, (4, 6))):
        for found in run_ranks(plan.ranks, continued, name, plan, place, steps):
            assert found == pytest.approx(expected[slice(*steps)], rel=CLOSE)


def cast(rank: Rank, name: str, plan: Plan) -> list[float]:
    replica = parallelize(made(name).float(), plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=0.01)
    shares = ([micro(number, 0, index) for index in range(MICROS)] for number in range(STEPS))
    return [step(replica, [optimizer], share, loss=loss).loss for share in shares]


@pytest.mark.parametrize("name", slow(["list", "tables", "grouped"], ("list",)))
def test_under_autocast(name: str) -> None:
    plan = Plan(precision="bfloat16")
    alone_there = run_ranks(1, cast, name, plan)[0]
    found = find_splits(made(name).float(), micro(0, 0, 0).batch, 2).splits
    one, other = run_ranks(2, cast, name, structs.replace(plan, tensor=2, splits=found))
    assert one == other
    assert one == pytest.approx(alone_there, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("chance", "its experts draw random numbers"),
        ("whispers", "its mixture keeps values from call to call"),
        ("bent", "with each expert on one rank, its"),
    ],
)
def test_experts_that_cannot_be_apart_stay_whole(name: str, why: str) -> None:
    found = find_splits(made(name), micro(0, 0, 0).batch, 2)
    assert not any(split.how == "experts" for split in found.splits.values())
    assert found.whole["blocks.0.mixture.experts.0.up.weight"].startswith(why)


def test_what_is_no_mixture_has_no_experts() -> None:
    with pytest.raises(SpecError, match="belongs to no mixture of experts"):
        splits("tables", 2, **{"blocks.*.mlp.up": Split(how="experts")})


def test_experts_as_the_user_wants_them() -> None:
    for asked in ({"blocks.*.mixture.experts": Split(how="whole")}, {"@experts": Split(how="whole")}):
        assert not any("experts" in name for name in splits("list", 2, **asked))
    assert splits("tables", 2, **{"@experts": Split(how="split")}) == splits("tables", 2)
    told = splits("tables", 2, **{"blocks.*.mixture.up": Split(how="experts", parts=(1, 4))})
    assert told["blocks.*.mixture.down_bias"] == Split(how="experts", parts=(1, 4))
    assert splits("list", 2, **{"blocks.*.mixture.experts": Split(how="experts")}) == splits("list", 2)


@pytest.mark.parametrize(
    ("name", "asked", "why"),
    [
        ("tables", {"blocks.*.mixture.up": Split(how="experts", parts=(5, 0))}, "tensor rank 1 would have no expert"),
        ("list", {"blocks.*.experts.0.up": Split(how="experts", parts=(1, 1))}, "all on one rank"),
        ("chance", {"blocks.*.mixture.experts": Split(how="experts")}, "its experts draw random numbers"),
    ],
)
def test_a_wrong_split_is_refused(name: str, asked: dict[str, Split], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        splits(name, 2, **asked)


def test_a_plan_that_makes_no_mixture_is_refused() -> None:
    plan = Plan(tensor=2, splits={"blocks.*.mlp.up.weight": Split(how="experts")})

    def refused(rank: Rank) -> None:
        with pytest.raises(SpecError, match="by experts, which it cannot be"):
            parallelize(made("list"), plan, rank.mesh(plan))

    run_ranks(2, refused)


def test_a_gradient_of_a_gradient_is_an_error() -> None:
    plan = Plan(tensor=2, precision="float64", splits=splits("tables", 2))

    def twice(rank: Rank) -> None:
        module = made("tables")
        parallelize(module, plan, rank.mesh(plan))
        (grad,) = torch.autograd.grad(
            module(**words)["balance"].sum(), module.blocks[0].mixture.router, create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()

    words = {"input_ids": micro(0, 0, 0).batch["input_ids"]}
    run_ranks(2, twice)
