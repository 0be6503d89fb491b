"""The tensor axis trains like one process: split layers, cut vocabularies, the same dropout masks, with other axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec import structs
from test_pipelined import CLOSE, MICROS, MODELS, alone, cut, in_stages, made, micro

from shardwise.errors import JobError, SpecError
from shardwise.models.gpt import GPT
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.tensor.find import find_splits
from shardwise.spec.plan import Plan, Recompute, Split
from tests.ranks import Rank, run_ranks

QUICK = ("tied", "dropout")
SPLIT = [name for name in MODELS if name not in ("resnet", "norm")]
MODELS["uneven"] = lambda: GPT(layers=2, width=48, heads=6, kv_heads=3, vocab=97, context=16, dropout=0.1)


def compare(name: str, how: dict[str, Any] | None = None, **fields: Any) -> Plan:
    plan = Plan(precision="float64", microbatches=MICROS, **fields)
    plan = cut(name, plan) if plan.pipeline > 1 else plan
    found = find_splits(made(name), micro(name, 1, 0, 0).batch, plan.tensor)
    plan = structs.replace(plan, splits=found.splits)
    curve, tested, values = run_ranks(1, alone, name, plan, dict(how or {}))[0]
    for here, tested_here, values_here, _ in run_ranks(plan.ranks, in_stages, name, plan, dict(how or {})):
        assert [x for x, _ in here] == pytest.approx([x for x, _ in curve], rel=CLOSE)
        assert [x for _, x in here] == pytest.approx([x for _, x in curve], rel=CLOSE)
        assert tested_here == pytest.approx(tested, rel=CLOSE)
        for key, value in values.items():
            assert torch.allclose(values_here[key], value, rtol=1e-6, atol=1e-9), key
    return plan


def slow(names: list[str], quick: tuple[str, ...] = QUICK) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow(SPLIT))
def test_two_tensor_ranks_train_like_one_process(name: str) -> None:
    compare(name, {"clip_norm": 0.5}, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["words", "dropout", "uneven", "encoder"])
def test_four_tensor_ranks_train_like_one_process(name: str) -> None:
    compare(name, tensor=4)


def test_heads_that_ranks_do_not_divide_are_split_unevenly() -> None:
    plan = compare("uneven", tensor=2)
    assert plan.splits["blocks.*.attention.qkv.weight"].parts == (4, 2, 2, 1, 2, 1)


@pytest.mark.parametrize("name", slow(["tied", "dropout", "frozen", "encoder"], ()))
def test_replicas_of_tensor_ranks_train_like_one_process(name: str) -> None:
    compare(name, {"clip_norm": 0.5}, data=2, tensor=2)


@pytest.mark.parametrize("name", slow(["tied", "dropout", "frozen", "encoder", "albert"], ()))
def test_stages_of_tensor_ranks_train_like_one_process(name: str) -> None:
    compare(name, pipeline=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("name", ["tied", "dropout", "frozen", "encoder"])
def test_shards_of_tensor_ranks_train_like_one_process(name: str, zero: int) -> None:
    compare(name, {"clip_norm": 0.5}, shard=2, zero=zero, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"pipeline": 2}, {"shard": 2}])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_tensor_ranks_that_compute_again_train_like_one_process(mode: Any, axes: dict[str, int]) -> None:
    compare("dropout", tensor=2, recompute=Recompute(mode=mode), **axes)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "pipeline": 2}, {"shard": 2, "pipeline": 2}, {"data": 2, "shard": 2}])
def test_three_axes_train_like_one_process(axes: dict[str, int]) -> None:
    compare("tied", tensor=2, **axes)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "virtual"), [("naive", 1), ("interleaved", 2), ("zero_bubble", 2), ("zbv", 2)])
def test_tensor_ranks_train_alike_under_every_schedule(schedule: str, virtual: int) -> None:
    compare("dropout", tensor=2, pipeline=2, schedule=schedule, virtual=virtual)


def replicated(rank: Rank, plan: Plan) -> Any:
    from jobs import Micro

    from shardwise.models.losses import next_token_loss
    from shardwise.parallel.step import step

    module = made("dropout").float()
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    for number in range(5):
        one = micro("dropout", number, 0, 0)
        batch = {"tokens": one.batch["tokens"], "targets": one.batch["targets"]}
        step(replica, [optimizer], [Micro(batch, one.stream)], loss=next_token_loss, clip_norm=0.5)
    assert replica.tensors is not None
    owned = replica.tensors.owned
    return {name: p.detach() for name, p in module.named_parameters() if name not in owned}


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_is_whole_has_the_same_bits_on_all_ranks(precision: Any) -> None:
    splits = find_splits(made("dropout"), micro("dropout", 1, 0, 0).batch, 2).splits
    one, other = run_ranks(2, replicated, Plan(tensor=2, splits=splits, precision=precision))
    assert one
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_splits_that_the_user_fixes() -> None:
    module, batch = made("dropout"), micro("dropout", 1, 0, 0).batch
    asked = {"blocks.*.mlp.up": Split(how="column"), "embed": Split(how="whole"), "*.qkv": Split(how="whole")}
    found = find_splits(module, batch, 2, asked=asked).splits
    assert found["blocks.*.mlp.up.weight"] == Split(how="column", parts=(1, 1, 1, 1))  # gate and up, halved each
    assert not [name for name in found if "embed" in name or "qkv" in name or "head" in name]


@pytest.mark.parametrize("dimension", ["@heads", "@hidden", "@vocabulary"])
def test_a_dimension_stays_whole_wherever_it_is(dimension: str) -> None:
    members = {"@heads": "attention", "@hidden": "mlp", "@vocabulary": "embed"}
    module, batch = made("dropout"), micro("dropout", 1, 0, 0).batch
    found = find_splits(module, batch, 2, asked={dimension: Split(how="whole")})
    for other, part in members.items():
        assert any(part in name for name in found.splits) == (other != dimension), found
    assert [why for name, why in found.whole.items() if members[dimension] in name][0] == "the plan keeps it whole"
    every = find_splits(module, batch, 2, asked=dict.fromkeys(members, Split(how="split"))).splits
    assert every == find_splits(module, batch, 2).splits


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"@heads": Split(how="split"), "blocks.*.attention.qkv": Split(how="whole")}, "nothing of this dimension"),
        ({"nothing.like.it": Split(how="column")}, "matches no parameter"),
        ({"blocks.*.mlp.up": Split(how="column", parts=(1, 1))}, "must stay on one rank"),
        ({"blocks.0.attention_norm": Split(how="column")}, "rms_norm: it needs a whole dim"),
        ({"blocks.*.attention.qkv": Split(how="column", parts=(5, 4))}, "does not fit"),
    ],
)
def test_a_wrong_split_is_refused(asked: dict[str, Split], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        find_splits(made("dropout"), micro("dropout", 1, 0, 0).batch, 2, asked=asked)


def test_what_cannot_be_split_says_why() -> None:
    with pytest.raises(JobError, match="nothing in this model can be split over 2 ranks"):
        find_splits(made("resnet"), micro("resnet", 1, 0, 0).batch, 2)
    found = find_splits(made("uneven"), micro("uneven", 1, 0, 0).batch, 4)
    assert found.whole["blocks.0.attention.qkv.weight"] == "3 heads or parts on 4 ranks"
    assert "blocks.*.mlp.up.weight" in found.splits


def test_a_plan_without_splits_is_refused() -> None:
    def refused(rank: Rank) -> None:
        with pytest.raises(SpecError, match="does not say what its tensor axis splits"):
            parallelize(made("dropout"), Plan(tensor=2), rank.mesh(Plan(tensor=2)))

    run_ranks(2, refused)
