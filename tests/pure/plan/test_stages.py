"""Where a pipeline is cut, against every possible cut; what its stages keep and how long it is idle."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shardwise.errors import NoPlanFits, SpecError
from shardwise.plan.explain import explain
from shardwise.plan.pipelined import in_flight, pipeline_bytes, pipeline_seconds, stage_seconds
from shardwise.plan.search import search
from shardwise.plan.stages import chain, cut, with_stages
from shardwise.spec.job import JobFacts
from shardwise.spec.layout import holds
from shardwise.spec.plan import Plan, Stage, parse_plan
from shardwise.spec.profile import CallProfile, ModelProfile
from tests.pure.plan.test_search import PROFILE, cluster

JOB = JobFacts(global_batch=32, steps=10)


def call(
    name: str, flops: float = 1e9, parameters: int = 10**6, reads: dict[str, tuple[int, int]] | None = None
) -> CallProfile:
    return CallProfile(
        name=name,
        parameters=parameters,
        parameter_bytes=4 * parameters,
        forward_flops=flops,
        activation_bytes=10**6,
        crossing_bytes=10**5,
        reads=reads or {},
    )


GPT = structs.replace(
    PROFILE,
    calls=(
        call("embed", 0.0, 8 * 10**6),
        *(call(f"blocks.{i}") for i in range(4)),
        call("head", 4e9, 0, {"embed.weight": (8 * 10**6, 32 * 10**6)}),
    ),
)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**31)
)
def test_no_other_cut_has_a_faster_slowest_stage(costs: list[int], stages: int, room: int, seed: int) -> None:
    def seconds(stage: int, first: int, last: int) -> float:
        total = float(sum(costs[first : last + 1]) * (1 + (stage + seed) % 3))  # unlike devices
        return float("inf") if room and total > room else total

    choices = [
        (0, *middle) for middle in itertools.combinations(range(1, len(costs)), stages - 1) if stages <= len(costs)
    ]

    def slowest(firsts: tuple[int, ...]) -> float:
        lasts = [*(first - 1 for first in firsts[1:]), len(costs) - 1]
        return max(seconds(i, a, b) for i, (a, b) in enumerate(zip(firsts, lasts, strict=True)))

    best = min(map(slowest, choices), default=float("inf"))
    if best == float("inf"):
        with pytest.raises(NoPlanFits):
            cut(len(costs), stages, seconds)
    else:
        firsts = tuple(cut(len(costs), stages, seconds))
        assert firsts in choices
        assert slowest(firsts) == best


def test_a_heavy_head_has_a_stage_of_its_own_and_the_tied_embedding_is_held_at_both_ends() -> None:
    plan = search(GPT, cluster(2), JOB, parse_plan("pipeline=2"))
    assert [(stage.first, stage.last, stage.holds) for stage in plan.stages] == [
        (0, 4, ()),
        (5, 5, ("embed.weight",)),
    ]
    assert plan.microbatches == 8
    text = explain(plan, GPT, cluster(2), JOB)
    assert "0 on rank 0 of the pipeline: embed to blocks.3, 50% of the FLOPs" in text
    assert "1 on rank 1 of the pipeline: head to head, with embed.weight, 50% of the FLOPs" in text
    assert [holds("model/embed.weight", plan, rank) for rank in (0, 1)] == [True, True]
    assert [holds("model/blocks.3.up", plan, rank) for rank in (0, 1)] == [True, False]
    assert [holds("optimizer/blocks.3.up/exp_avg", plan, rank) for rank in (0, 1)] == [True, False]


def test_a_stage_that_does_not_fit_gives_calls_to_another() -> None:
    free = search(GPT, cluster(2), JOB, parse_plan("pipeline=2"))
    assert free.predicted is not None
    tight = search(GPT, cluster(2, memory_bytes=free.predicted.peak_bytes - 10**6), JOB, parse_plan("pipeline=2"))
    assert tight.stages[1].first < free.stages[1].first or tight.microbatches > free.microbatches
    with pytest.raises(NoPlanFits, match="parameters"):
        search(GPT, cluster(2, memory_bytes=10**6), JOB, parse_plan("pipeline=2"))


def test_stages_that_a_plan_already_has_stay() -> None:
    given = Plan(pipeline=2, stages=(Stage(first=0, last=1), Stage(first=2, last=5)))
    assert [s.first for s in with_stages(given, GPT, lambda stage, first, last: 1.0).stages] == [0, 2]


@pytest.mark.parametrize("ends", [[(0, 8), (9, 5)], [(3, -1), (0, 5)], [(0, 1), (2, 4)], [(0, 2), (2, 5)]])
def test_stages_that_are_not_all_parts_in_order_are_refused(ends: list[tuple[int, int]]) -> None:
    given = Plan(pipeline=2, stages=tuple(Stage(first=a, last=b) for a, b in ends))
    with pytest.raises(SpecError, match="0 to 5, one stage after the other"):
        with_stages(given, GPT, lambda stage, first, last: 1.0)


def test_more_microbatches_are_cut_anew() -> None:
    plan = parse_plan("pipeline=2")
    sizes = range(100 * 10**6, 700 * 10**6, 10**7)
    fits = {size for size in sizes if _fits(size, plan)}
    assert fits
    for microbatches in ("8", "16", "32"):
        assert fits >= {size for size in sizes if _fits(size, {**plan, "microbatches": microbatches})}


def _fits(memory_bytes: int, plan: dict[str, Any]) -> bool:
    try:
        search(GPT, cluster(2, memory_bytes=memory_bytes), JOB, plan)
    except NoPlanFits:
        return False
    return True


@pytest.mark.parametrize(
    ("schedule", "virtual", "expected"),
    [
        ("naive", 1, [1, 1, 1, 1]),
        ("gpipe", 1, [8, 8, 8, 8]),
        ("1f1b", 1, [4, 3, 2, 1]),
        ("interleaved", 2, [6, 5, 4, 3, 6, 5, 4, 3]),
        ("zbv", 2, [6, 5, 4, 3, 3, 4, 5, 6]),
    ],
)
def test_a_schedule_keeps_so_many_microbatches(schedule: str, virtual: int, expected: list[int]) -> None:
    plan = Plan(pipeline=4, microbatches=8, schedule=schedule, virtual=virtual)
    assert [in_flight(plan, stage) for stage in range(4 * virtual)] == expected


def test_the_bubble_is_as_long_as_its_formula_says() -> None:
    profile = ModelProfile(blocks=(), calls=tuple(call(f"blocks.{i}") for i in range(4)))
    plan = with_stages(Plan(pipeline=4, microbatches=8), profile, lambda stage, first, last: last - first + 1.0)
    seconds = stage_seconds(plan, profile, JOB, rate=1e9, bandwidth=1e30, room=0)
    busy, idle = pipeline_seconds(plan, seconds)
    assert (busy, idle) == pytest.approx((8 * 3 * 4.0, 3 * 3 * 4.0))
    naive = structs.replace(plan, schedule="naive")
    assert pipeline_seconds(naive, seconds) == pytest.approx((8 * 3 * 4.0, 8 * 3 * 3 * 4.0))
    sizes = pipeline_bytes(profile, plan, JOB)
    assert sizes["parameters"] == 4 * 10**6
    assert sizes["activations"] == 4 * 4 * 10**6, "the first of four stages keeps four microbatches of four samples"
    chosen = chain(GPT)
    assert chosen.parameters(5, 5) == (8 * 10**6, 32 * 10**6), "the tied head holds the embedding"
    assert chosen.parameters(0, 5) == (12 * 10**6, 48 * 10**6), "once where both are"
    assert (chosen.arriving_bytes(0), chosen.arriving_bytes(3)) == (0, 10**5)
