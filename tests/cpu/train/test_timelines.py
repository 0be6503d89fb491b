"""Recorded steps of real runs: every rank's spans cover its step, and nothing happens before what it needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from shardwise import events
from shardwise.comm.mesh import connect
from shardwise.observe.timeline import COMPUTING, KINDS, StepTimeline, timelines
from shardwise.spec.plan import Plan
from shardwise.train.timeline import recorded_steps, timed
from tests.cpu.train.test_train import named

Train = Callable[..., Any]
ROUNDING_S = 3e-6  # events are in microseconds


def found_in(trained: Train, plan: str, **options: Any) -> list[StepTimeline]:
    """The recorded steps of a run, each of them sound."""
    result = trained(plan=plan, eval_every=0, save_every=0, **options)
    recorded = events.read(result.path / "events.jsonl")
    steps = timelines(recorded)
    assert {step.step for step in steps} == recorded_steps(1, result.summary.step)
    assert all(event["dropped"] == 0 for event in recorded if event["event"] == "timeline")
    for event in named(result.path, "timeline"):
        ends = [(at, at + lasted) for _, _, _, at, lasted in event["spans"]]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(ends))), "spans of a rank do not overlap"
    for step in steps:
        for row in step.rows:
            assert sum(row.totals.values()) == pytest.approx(row.seconds, abs=1e-9)
            assert row.pieces[-1].end - row.pieces[0].begin == pytest.approx(row.seconds, abs=1e-9)
            assert all(a.end == b.begin for a, b in itertools.pairwise(row.pieces))
    return steps


def computed(step: StepTimeline) -> dict[tuple[str, int, int], tuple[float, float]]:
    """When each forward and backward of a stage on a microbatch began and ended."""
    found: dict[tuple[str, int, int], tuple[float, float]] = {}
    for piece in (piece for row in step.rows for piece in row.pieces if piece.kind in COMPUTING):
        begin, end = found.get(piece[:3], (piece.begin, piece.end))
        found[piece[:3]] = min(begin, piece.begin), max(end, piece.end)
    return found


def assert_causal(step: StepTimeline, stages: int, micros: int) -> None:
    """A forward begins after that of the stage before; backward after that of the stage behind, and after forward."""
    when = computed(step)
    for stage, micro in itertools.product(range(stages), range(micros)):
        forward = when["forward", stage, micro]
        backward = when.get(("backward", stage, micro)) or when["weights", stage, micro]
        assert forward[1] <= backward[0] + ROUNDING_S
        if stage:
            assert when["forward", stage - 1, micro][1] <= forward[0] + ROUNDING_S
            earlier = when.get(("backward", stage - 1, micro))
            assert earlier is None or stage == 1 or backward[0] <= earlier[0] + ROUNDING_S
        if ("weights", stage, micro) in when:
            assert backward[0] <= when["weights", stage, micro][0]


def test_replicas_record_forward_backward_communication_and_optimizer(trained: Train) -> None:
    steps = found_in(trained, "data=2,microbatches=2")
    assert [step.step for step in steps] == [3, 4, 5, 7, 8]
    for step in steps:
        assert not step.staged
        assert [row.rank for row in step.rows] == [0, 1]
        for row in step.rows:
            kinds = [piece.kind for piece in row.pieces if piece.kind in ("forward", "backward", "optimizer")]
            assert kinds == ["forward", "backward"] * 2 + ["optimizer"]
            assert all(row.totals[kind] > 0 for kind in KINDS if kind != "weights")


def test_two_stages_record_what_happened_in_the_order_in_which_it_had_to(trained: Train) -> None:
    for step in found_in(trained, "pipeline=2,microbatches=4"):
        assert step.staged
        assert_causal(step, 2, 4)
        counts = {rank: [p.kind for p in step.rows[rank].pieces].count("forward") for rank in (0, 1)}
        assert counts == {0: 4, 1: 4}
        assert all(0 < row.bubble < 1 for row in step.rows)


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [("naive", 2), ("gpipe", 2), ("1f1b", 2), ("interleaved", 4), ("zero_bubble", 4), ("zbv", 4)],
)
def test_every_schedule_records_every_stage_and_microbatch(schedule: str, stages: int, trained: Train) -> None:
    virtual = f",virtual={stages // 2}" if stages > 2 else ""
    for step in found_in(trained, f"pipeline=2,microbatches=4,schedule={schedule}{virtual}"):
        assert_causal(step, stages, 4)
        kinds = {kind for kind, _, _ in computed(step)}
        assert kinds == {"forward", "backward"} | ({"weights"} if schedule in ("zero_bubble", "zbv") else set())


def test_which_steps_are_recorded() -> None:
    assert recorded_steps(1, 1000) == {3, 4, 5, 501, 502}
    assert recorded_steps(401, 450) == {403, 404, 405, 426, 427}
    assert recorded_steps(1, 5) == {3, 4, 5}
    assert recorded_steps(1, 3) == {3}
    assert recorded_steps(1, 1) == {1}
    assert recorded_steps(7, 8) == {8}
    assert not recorded_steps(9, 8) & set(range(9, 100))


def test_a_step_that_fails_is_not_told() -> None:
    mesh = connect(Plan(), rank=0, world=1, store=None)
    told: list[events.Event] = []
    with events.sink(told.append):
        with pytest.raises(ZeroDivisionError), timed(mesh, 1, wanted=True):
            raise ZeroDivisionError
        with timed(mesh, 2, wanted=False), mesh.timeline.span("forward"):
            pass
        with timed(mesh, 3, wanted=True), mesh.timeline.span("forward"):
            pass
    assert [(one["step"], len(one["spans"])) for one in told] == [(3, 1)]
