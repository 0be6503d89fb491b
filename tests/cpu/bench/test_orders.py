"""What the ranks of a pipeline do, in which order: the lengths that are known, and orders that wait for each other."""

from __future__ import annotations

import pytest

from bench.orders import SEVERAL, Action, Costs, makespan, orders


def length(schedule: str, ranks: int, micros: int, weight_s: float = 1.0) -> float:
    count = ranks * (2 if schedule in SEVERAL else 1)
    return makespan(orders(schedule, ranks, micros), {stage: Costs(1.0, 1.0, weight_s) for stage in range(count)})


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micros", [4, 8])
def test_the_lengths_of_schedules_are_those_of_their_formulas(ranks: int, micros: int) -> None:
    assert length("naive", ranks, micros) == 3 * ranks * micros
    assert length("gpipe", ranks, micros) == length("1f1b", ranks, micros) == 3 * (micros + ranks - 1)
    assert length("interleaved", ranks, micros) == 3 * (2 * micros + ranks - 1)
    assert 6 * micros <= length("zero_bubble", ranks, micros) <= length("interleaved", ranks, micros)
    assert length("zbv", ranks, micros) >= 6 * micros + ranks - 1


def test_zero_bubble_waits_only_for_the_first_microbatch() -> None:
    assert length("zbv", 4, 8) == 6 * 8 + 3
    assert length("zbv", 2, 8) == 6 * 8 + 1


def test_every_stage_does_every_microbatch_once() -> None:
    for schedule in ("gpipe", "1f1b", *SEVERAL):
        done = [action for order in orders(schedule, 2, 6) for action in order]
        assert len(done) == len(set(done))
        for stage in range(4 if schedule in SEVERAL else 2):
            kinds = {(a.kind, a.micro) for a in done if a.stage == stage}
            for micro in range(6):
                assert ("F", micro) in kinds
                assert (("B", micro) in kinds) != ({("I", micro), ("W", micro)} <= kinds), (schedule, stage, micro)


def test_orders_that_wait_for_each_other_are_an_error() -> None:
    costs = {0: Costs(1, 1, 1), 1: Costs(1, 1, 1)}
    with pytest.raises(ValueError, match="wait for each other"):
        makespan([[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]], costs)
