"""A pipeline of ranks, under every schedule, against one process that goes through the same microbatches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import batch, build, loss
from torch import Tensor, nn

from shardwise.parallel.dataflow import Dataflow, dataflow
from shardwise.parallel.pipeline import SEVERAL, SINGLE, Micro, Pipeline, all_follow, stages_of
from shardwise.parallel.stage import Stage, held, parts
from shardwise.spec.plan import Plan
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


def flows(module: nn.Module, micros: list[list[dict[str, Tensor]]]) -> list[list[Micro]]:
    """With one dataflow for each shape."""
    known: dict[str, Dataflow] = {}
    found = []
    for step in micros:
        found.append([])
        for one in step:
            shapes = str({key: value.shape for key, value in one.items()})
            if shapes not in known:
                known[shapes] = dataflow(copy.deepcopy(module), one, loss=loss)
            found[-1].append(Micro(one, known[shapes]))
    return found


def on_ranks(rank: Rank, name: str, schedule: str, virtual: int) -> Any:
    module = build(name)
    plan = Plan(pipeline=rank.world, virtual=virtual, schedule=schedule)
    mesh = rank.mesh(plan)
    group = mesh.axis("pipeline").group
    assert group is not None
    steps = flows(module, batches(name))
    flow = steps[0][0].flow
    count = rank.world * virtual
    every = parts(flow, [len(flow.calls) * number // count for number in range(count)])
    numbers = stages_of(rank.rank, plan)
    mine = [every[number] for number in numbers]
    names = {parameter for part in mine for parameter in held(module, flow, part)}
    pipeline = Pipeline(
        Stage(module, flow, mine), numbers, count, group, torch.device("cpu"), schedule=schedule, head=head
    )
    values = [float(sum(pipeline.step(micros), torch.zeros(()))) for micros in steps]
    return values, {n: p.grad for n, p in module.named_parameters() if n in names}


def alone(name: str) -> tuple[list[float], dict[str, Tensor | None]]:
    module = build(name)
    values = []
    for step in batches(name):
        values.append(0.0)
        for one in step:
            value = head(module(**one), one)
            value.backward()
            values[-1] += value.item()
    return values, {n: p.grad for n, p in module.named_parameters()}


def compare(found: list[Any], name: str) -> None:
    values, grads = alone(name)
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
