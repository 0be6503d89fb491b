"""Replicas in stages train like one process: the same losses, norms and parameters, with data=1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import build
from jobs import Micro
from torch import Tensor, nn

from shardwise.data.order import stream_seed
from shardwise.errors import CommError, JobError, NonFiniteLoss, SpecError
from shardwise.models.cuts import profile_calls
from shardwise.models.encoder import Encoder
from shardwise.models.gpt import GPT
from shardwise.models.resnet import ResNet
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.step import evaluate, step
from shardwise.plan.stages import with_stages
from shardwise.plan.support import SEVERAL_STAGES
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile
from tests.ranks import Rank, run_ranks

STEPS, MICROS, SAMPLES = 20, 4, 2
CLOSE = 1e-8  # relative, of losses after STEPS steps
WORDS = 97


def frozen_gpt() -> nn.Module:
    module = GPT(layers=4, width=16, heads=2, vocab=WORDS, context=16, tied=False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("blocks.0" not in name and "blocks.3" not in name)
    return module


class Words(nn.Module):
    """Tokens -> scores through linear blocks, each straight from what it is given."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.BatchNorm1d(16, affine=False) if norm else None
        self.head = nn.Linear(16, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x).relu() + x
            if index == 2 and self.norm is not None:
                x = self.norm(x.flatten(0, 1)).view_as(x)
        return self.scores(x)

    def scores(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x)
        return found


class Peeks(Words):
    """The last part takes the embedding's weights without a gradient for them."""

    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x) + x @ self.embed.weight.detach().T


class Remembers(Words):
    """It keeps a table from its first forward on."""

    table: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, WORDS, dtype=self.head.weight.dtype)
        return super().forward(tokens)

    def scores(self, x: Tensor) -> Tensor:
        assert self.table is not None
        return super().scores(x) * self.table


MODELS: dict[str, Callable[[], nn.Module]] = {
    "words": Words,
    "norm": lambda: Words(norm=True),
    "peeks": Peeks,
    "remembers": Remembers,
    "gpt": lambda: GPT(layers=4, width=16, heads=2, vocab=WORDS, context=16, tied=False),
    "tied": lambda: GPT(layers=3, width=16, heads=2, vocab=WORDS, context=16, tied=True),
    "dropout": lambda: GPT(layers=4, width=16, heads=2, vocab=WORDS, context=16, dropout=0.2),
    "frozen": frozen_gpt,
    "encoder": lambda: Encoder(layers=4, width=16, heads=2, vocab=WORDS, context=16, classes=5),
    "resnet": lambda: ResNet(depth=8, width=4, classes=10),
    "albert": lambda: build("albert"),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[name]()


def micro(name: str, number: int, place: int, index: int) -> Micro:
    """A microbatch of a step; texts are of unlike lengths."""
    g = torch.Generator().manual_seed(1000 * number + 10 * place + index)
    if name == "resnet":
        batch = {
            "image": torch.randn(SAMPLES, 3, 8, 8, generator=g),
            "targets": torch.randint(0, 10, (SAMPLES,), generator=g),
        }
    else:
        length = 16 if (number + index) % 3 else 11
        tokens = torch.randint(0, WORDS, (SAMPLES, length), generator=g)
        batch = {"input_ids" if name == "albert" else "tokens": tokens, "targets": tokens.roll(-1, 1)}
    return Micro(batch, stream_seed(0, number, place, index))


def loss(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scores = output if isinstance(output, Tensor) else output["logits"]
    targets = batch["targets"]
    if scores.dim() == 2 and targets.dim() == 2:  # one class for each text
        targets = targets[:, 0] % scores.shape[-1]
    total = nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction="sum")
    return total, scores.new_tensor(float(targets.numel()))


def cut(name: str, plan: Plan) -> Plan:
    calls = profile_calls(lambda: made(name), micro(name, 1, 0, 0).batch, loss=loss)
    return with_stages(plan, ModelProfile(blocks=(), calls=calls), lambda s, a, b: float(b - a + 1))


def learn(replica: Replica, shares: Callable[[int], list[Micro]], **how: Any) -> list[tuple[float, float]]:
    optimizer = torch.optim.AdamW(replica.module.parameters(), lr=0.01)
    found = []
    for number in range(STEPS):
        result = step(replica, [optimizer], shares(number), loss=loss, **how)
        assert result.grad_norm is not None
        found.append((result.loss, result.grad_norm))
    return found


def share(name: str, number: int, place: int, plan: Plan) -> list[Micro]:
    """Every fifth step the second replica has less, and every seventh, with the first, nothing; but where ranks need as
    many microbatches."""
    few = place == 1 and plan.data > 1 and plan.shard == 1 and name not in ("norm", "resnet")
    count = 0 if few and number % 7 == 0 else 3 if few and number % 5 == 4 else MICROS
    return [micro(name, number, place, index) for index in range(count)]


def in_stages(rank: Rank, name: str, plan: Plan, how: dict[str, Any]) -> Any:
    mesh = rank.mesh(plan)
    before = made(name)
    forwards = {n for n, part in before.named_modules() if "forward" in vars(part)}
    replica = parallelize(before, plan, mesh, batch_norm=how.pop("batch_norm", "sync"))
    place = mesh.axis("batch").rank
    curve = learn(replica, lambda number: share(name, number, place, plan), **how)
    sizes = sum(p.untyped_storage().nbytes() for p in replica.module.parameters())
    held_out = [micro(name, 100 + 2 * i + place, 0, 0).batch for i in range(3)]
    tested = evaluate(replica, held_out, loss, {"top": top})
    replica.gather()
    replica.close()
    assert {n for n, part in before.named_modules() if "forward" in vars(part)} == forwards
    return curve, tested, dict(replica.module.state_dict()), sizes


def top(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scores = output if isinstance(output, Tensor) else output["logits"]
    return scores.amax(-1).sum(), scores.new_tensor(float(scores[..., 0].numel()))


def alone(rank: Rank, name: str, plan: Plan, how: dict[str, Any]) -> Any:
    replica = parallelize(made(name), Plan(precision=plan.precision), rank.mesh(Plan(precision=plan.precision)))
    places = range(plan.replicas)
    curve = learn(replica, lambda n: [m for place in places for m in share(name, n, place, plan)], **how)
    held_out = [micro(name, 100 + 2 * i + place, 0, 0).batch for place in places for i in range(3)]
    return curve, evaluate(replica, held_out, loss, {"top": top}), dict(replica.module.state_dict())


def compare(name: str, how: dict[str, Any] | None = None, **fields: Any) -> list[Any]:
    plan = Plan(precision="float64", microbatches=MICROS, **fields)
    plan = cut(name, plan) if plan.pipeline > 1 else plan
    curve, tested, values = run_ranks(1, alone, name, plan, how or {})[0]
    found = run_ranks(plan.ranks, in_stages, name, plan, how or {})
    for here, tested_here, values_here, _ in found:
        assert [x for x, _ in here] == pytest.approx([x for x, _ in curve], rel=CLOSE)
        assert [x for _, x in here] == pytest.approx([x for _, x in curve], rel=CLOSE)
        assert tested_here == pytest.approx(tested, rel=CLOSE)
        for key, value in values.items():
            assert torch.allclose(values_here[key], value, rtol=1e-6, atol=1e-9), key
    return found


QUICK = ("norm", "remembers", "tied", "dropout", "resnet")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_two_stages_train_like_one_process(name: str) -> None:
    compare(name, pipeline=2)


@pytest.mark.parametrize(
    "name", ["dropout", "peeks", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tied", "frozen", "albert"))]
)
def test_two_replicas_of_two_stages_train_like_one_process(name: str) -> None:
    compare(name, data=2, pipeline=2)


@pytest.mark.parametrize(
    ("schedule", "virtual"),
    [
        pytest.param(name, 2 if name in SEVERAL_STAGES else 1, marks=pytest.mark.slow)
        for name in ("naive", "gpipe", "interleaved", "zero_bubble", "zbv")
    ],
)
def test_two_replicas_train_alike_under_every_schedule(schedule: str, virtual: int) -> None:
    compare("dropout", data=2, pipeline=2, schedule=schedule, virtual=virtual)
    compare("tied", data=2, pipeline=2, schedule=schedule, virtual=virtual)


@pytest.mark.parametrize(("precision", "close"), [("bfloat16", 2e-3), ("float16", 2e-4), ("float32", 1e-5)])
def test_a_pipeline_computes_in_the_plan_s_precision(precision: Any, close: float) -> None:
    plan = cut("gpt", Plan(precision=precision, microbatches=MICROS, pipeline=2))
    curve, tested, _ = run_ranks(1, alone, "gpt", plan, {})[0]
    for here, tested_here, *_ in run_ranks(2, in_stages, "gpt", plan, {}):
        assert [x for x, _ in here[:5]] == pytest.approx([x for x, _ in curve[:5]], rel=close)
        assert tested_here["loss"] == pytest.approx(tested["loss"], rel=20 * close)


class Poisoned(nn.Module):
    """Its second block gives what is not a number in the third step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.steps = 0

    def forward(self, image: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            image = block(image)
            if index == 1 and self.steps == 2:
                image = image * torch.nan
        return image


def poisoned(rank: Rank, plan: Plan) -> tuple[str, list[list[float]]]:
    torch.manual_seed(1)
    replica = parallelize(Poisoned(), plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(replica.module.parameters(), lr=0.1)
    said = ""
    for number in range(3):
        replica.module.steps = number  # type: ignore[assignment]
        before = [p.detach().flatten().tolist() for _, p in replica.named()]
        try:
            step(replica, [optimizer], [Micro({"image": torch.ones(2, 4)}, 0)] * 2, loss=square)
        except NonFiniteLoss as error:
            said = str(error)
            assert before == [p.detach().flatten().tolist() for _, p in replica.named()]
    return said, before


def square(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return output.square().sum(), output.new_tensor(float(output.numel()))


def test_a_loss_that_is_not_a_number_is_an_error_on_every_rank_and_changes_nothing() -> None:
    calls = profile_calls(Poisoned, {"image": torch.ones(2, 4)}, loss=square)
    plan = with_stages(
        Plan(pipeline=2, microbatches=2), ModelProfile(blocks=(), calls=calls), lambda s, a, b: float(b - a)
    )
    for said, _ in run_ranks(2, poisoned, plan):
        assert "the loss is nan on rank 0. No parameter was changed." in said


def refused(rank: Rank, plan: Plan, settings: dict[str, Any]) -> str:
    with pytest.raises((SpecError, JobError)) as caught:
        parallelize(made("gpt"), plan, rank.mesh(plan), **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"coupled": "gather"}, "coupled='gather' does not go with pipeline=2"),
        ({"compile": True}, "compile=True does not go with pipeline=2"),
    ],
)
def test_what_does_not_go_with_a_pipeline_is_refused(settings: dict[str, Any], said: str) -> None:
    assert all(said in each for each in run_ranks(2, refused, cut("gpt", Plan(pipeline=2)), settings))


def test_a_pipeline_without_cuts_is_refused() -> None:
    assert all("does not say where to cut" in each for each in run_ranks(2, refused, Plan(pipeline=2), {}))


def test_gradients_are_clipped_by_the_norm_of_all_stages() -> None:
    compare("tied", {"clip_norm": 0.5}, pipeline=2)
    compare("peeks", {"clip_norm": 0.5}, data=2, pipeline=2)


def test_norms_over_replicas_are_the_same_in_stages() -> None:
    plan = cut("resnet", Plan(data=2, pipeline=2, precision="float64", microbatches=MICROS))
    expected = run_ranks(2, in_stages, "resnet", Plan(data=2, precision="float64", microbatches=MICROS), {})[0]
    for curve, tested, values, _ in run_ranks(4, in_stages, "resnet", plan, {}):
        assert torch.tensor(curve).allclose(torch.tensor(expected[0]), rtol=CLOSE)
        assert tested == pytest.approx(expected[1], rel=CLOSE)
        assert all(torch.allclose(values[key], value, rtol=1e-6, atol=1e-9) for key, value in expected[2].items())


def test_one_receive_buffer_for_several_microbatches_keeps_no_casts_of_the_first() -> None:
    curves = []
    for schedule in ("gpipe", "naive"):
        plan = cut("words", Plan(pipeline=2, precision="bfloat16", microbatches=MICROS, schedule=schedule))
        curves.append(run_ranks(2, in_stages, "words", plan, {})[0][0])
    assert curves[0] == curves[1]


def test_stages_of_one_rank_hand_over_what_they_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", "gloo")  # it cannot send to itself
    compare("tied", pipeline=2, schedule="zbv", virtual=2)


class Choosy(Words):
    """In evaluation it adds another parameter behind its last part."""

    def scores(self, x: Tensor) -> Tensor:
        found = super().scores(x)
        return found if self.training else found + x @ self.embed.weight.T


def choosy(rank: Rank, plan: Plan) -> str:
    replica = parallelize(Choosy(), plan, rank.mesh(plan))
    try:
        evaluate(replica, [micro("words", 0, 0, 0).batch], loss)
    except (JobError, CommError) as error:  # the stage that has it waits for the other
        return str(error)
    return ""


def test_a_parameter_that_another_stage_has_is_an_error() -> None:
    calls = profile_calls(Choosy, micro("words", 0, 0, 0).batch, loss=loss)
    plan = with_stages(Plan(pipeline=2), ModelProfile(blocks=(), calls=calls), lambda s, a, b: float(b - a))
    assert "stage 1 needs 'embed.weight', which is in another stage" in run_ranks(2, choosy, plan)[1]


def skips(rank: Rank, plan: Plan) -> tuple[bool, bool]:
    """Whether the third step was skipped, and left the buffers as they were."""
    replica = parallelize(made("resnet"), plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(replica.module.parameters(), lr=0.1)
    before: list[Tensor] = []
    for number in range(3):
        shares = [micro("resnet", number, 0, index) for index in range(MICROS)]
        if number == 2:
            shares[1].batch["image"][0] = torch.nan
            before = [buffer.clone() for buffer in replica.buffers()]
        result = step(replica, [optimizer], shares, loss=loss, on_nan="skip")
    same = [torch.equal(a, b) for a, b in zip(before, replica.buffers(), strict=True)]
    return result.skipped, bool(same) and all(same)


def test_a_step_that_is_skipped_leaves_no_trace_in_buffers() -> None:
    plan = cut("resnet", Plan(pipeline=2, microbatches=MICROS))
    assert run_ranks(2, skips, plan) == [(True, True)] * 2


def test_a_rank_has_the_parameters_of_its_stage_alone() -> None:
    found = compare("gpt", pipeline=4)
    whole = sum(p.nbytes for p in made("gpt").double().parameters())
    sizes = [size for *_, size in found]
    assert whole <= sum(sizes) < 1.01 * whole
    assert max(sizes) < 0.5 * whole
