"""A pipeline of ranks, under every schedule, against one process that goes through the same microbatches."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from architectures import batch, build, loss
from msgspec import structs
from torch import Tensor, nn

from shardwise.models.cuts import held, parts
from shardwise.models.dataflow import dataflow
from shardwise.parallel.flows import Flows
from shardwise.parallel.pipeline import SEVERAL, SINGLE, Micro, Pipeline, all_follow, stages_of
from shardwise.parallel.stage import Stage
from shardwise.spec.plan import Plan
from shardwise.spec.plan import Stage as Stages
from tests.ranks import Rank, run_ranks

CLOSE = 1e-9  # relative
LENGTHS = (12, 12, 7, 12)  # tokens of the microbatches


def batches(name: str, steps: int = 2) -> list[list[dict[str, Tensor]]]:
    """Microbatches of several lengths, where the model takes text."""
    one = batch(name)
    if set(one) != {"input_ids", "attention_mask"} and set(one) != {"input_ids"}:
        return [[one] * len(LENGTHS)] * steps
    return [
        [
            {
                key: (value + step) % 97 + 3 if key == "input_ids" else value
                for key, value in ((k, v[:, :length]) for k, v in one.items())
            }
            for length in LENGTHS
        ]
        for step in range(steps)
    ]


def head(output: Any, one: Any) -> Tensor:
    return loss(output, one)[0]


def planned(module: nn.Module, one: Any, plan: Plan) -> Plan:
    """The plan with stages of about as many calls each."""
    flow = dataflow(copy.deepcopy(module), one, loss=loss)
    calls, count = len(flow.calls), plan.pipeline * plan.virtual
    ends = [calls * number // count for number in range(count + 1)]
    stages = tuple(Stages(first=a, last=b - 1) for a, b in zip(ends, ends[1:], strict=False))
    return structs.replace(plan, blocks=tuple(one.name for one in flow.calls), stages=stages)


def on_ranks(rank: Rank, name: str, schedule: str, virtual: int, count: int | None = None) -> Any:
    module = build(name)
    steps = [step[:count] for step in batches(name)]
    plan = planned(module, steps[0][0], Plan(pipeline=rank.world, virtual=virtual, schedule=schedule))
    mesh = rank.mesh(plan)
    group = mesh.axis("pipeline").group
    assert group is not None
    numbers = stages_of(rank.rank, plan)
    names: set[str] = {name for name, _ in module.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    how: dict[str, Any] = {"numbers": numbers, "kept": names, "shapes": shapes}
    first = Flows(module, plan, contextlib.nullcontext, **how).route(steps[0][0], None, loss=loss)
    names = {parameter for number in numbers for parameter in held(module, first.flow, first.parts[number])}
    stage = Stage(module, plan.blocks, names)
    stage.open()
    flows = Flows(module, plan, stage.closed, numbers=numbers, kept=names, shapes=shapes)
    micros: list[Micro] = []
    values: list[float] = []
    reduced: list[int] = []

    def compute(number: int, chunk: int, received: Any) -> Any:
        batch, route = micros[chunk]
        found = stage.run(route.flow, route.parts[number], batch, received)
        if number + 1 < len(plan.stages):
            return found
        values[-1] += head(found, batch).item()
        return head(found, batch)

    pipeline = Pipeline(
        module,
        numbers,
        len(plan.stages),
        group,
        torch.device("cpu"),
        schedule=schedule,
        compute=compute,
        reduce=reduced.append,
    )
    for step in steps:
        values.append(0.0)
        micros[:] = [Micro(one, flows.route(one, None, loss=loss)) for one in step]
        pipeline.step(micros)
    assert sorted(reduced) == sorted(numbers * len(steps)), "once for each stage and step"
    return values, {n: p.grad for n, p in module.named_parameters() if n in names}


def alone(name: str, count: int | None = None) -> tuple[list[float], dict[str, Tensor | None]]:
    module = build(name)
    values = []
    for step in batches(name):
        values.append(0.0)
        for one in step[:count]:
            value = head(module(**one), one)
            value.backward()
            values[-1] += value.item()
    return values, {n: p.grad for n, p in module.named_parameters()}


def compare(found: list[Any], name: str, count: int | None = None) -> None:
    values, grads = alone(name, count)
    assert [sum(each) for each in zip(*(rank[0] for rank in found), strict=True)] == pytest.approx(values, rel=CLOSE)
    # Some are zero but for rounding.
    floor = 1e-4 * max(
        float(grad.norm()) for grad in grads.values() if grad is not None
    )  # some are zero but for rounding
    for parameter, grad in grads.items():
        there = [rank[1][parameter] for rank in found if rank[1].get(parameter) is not None]
        if grad is None:
            assert not any(float(each.abs().max()) for each in there), parameter
        else:
            assert (sum(there) - grad).norm() <= CLOSE * max(float(grad.norm()), floor), parameter


@pytest.mark.parametrize("schedule", [*SINGLE, *SEVERAL])
@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_every_schedule_computes_what_one_process_computes(schedule: str, name: str) -> None:
    compare(run_ranks(2, on_ranks, name, schedule, 2 if schedule in SEVERAL else 1), name)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv"])
def test_with_few_microbatches_a_schedule_gives_way_or_does_with_them(schedule: str, count: int) -> None:
    virtual = 2 if schedule in SEVERAL else 1
    compare(run_ranks(2, on_ranks, "tied", schedule, virtual, count), "tied", count)


@pytest.mark.parametrize("name", ["t5", "unet", "albert"])
def test_what_crosses_besides_the_hidden_state_arrives(name: str) -> None:
    compare(run_ranks(3, on_ranks, name, "1f1b", 1), name)


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
@pytest.mark.parametrize("name", ["clip", "t5", "unet", "frozen"])
def test_what_follows_from_nothing_received_has_its_gradients_under_zero_bubble_too(schedule: str, name: str) -> None:
    compare(run_ranks(2, on_ranks, name, schedule, 2), name)


def test_a_tower_that_begins_inside_a_stage_is_seen() -> None:
    module = build("clip")
    flow = dataflow(copy.deepcopy(module), batch("clip"), loss=loss)
    follow = [all_follow(flow, part, module) for part in parts(flow, [0, 3, 6, 9])]
    assert follow[0]
    assert not all(follow)
    module = build("tied")
    flow = dataflow(copy.deepcopy(module), batch("tied"), loss=loss)
    assert all(all_follow(flow, part, module) for part in parts(flow, [0, 2, 4]))
