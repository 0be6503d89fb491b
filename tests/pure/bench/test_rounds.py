from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.rounds import Lost, order, play, turns


def test_the_order_rotates_and_turns_round() -> None:
    names = ["a", "b", "c"]
    assert ["".join(order(names, n)) for n in range(7)] == ["abc", "cba", "bca", "acb", "cab", "bac", "abc"]


@given(st.integers(1, 7), st.integers(1, 20))
def test_every_system_has_one_turn_a_round(systems: int, rounds: int) -> None:
    names = [f"s{i}" for i in range(systems)]
    played = list(turns(names, rounds))
    for number in range(rounds):
        mine = [name for each, name in played if each == number]
        assert sorted(mine) == names
    assert [number for number, _ in played] == sorted(number for number, _ in played)


def test_over_all_rounds_every_system_is_first_equally_often() -> None:
    names = ["a", "b", "c", "d"]
    first = Counter(order(names, number)[0] for number in range(24))
    assert set(first.values()) == {6}


def test_values_are_kept_round_by_round() -> None:
    calls: list[str] = []

    def turn(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = play(["a", "b"], 2, turn)
    assert calls == ["a", "b", "b", "a"]
    assert found["a"].values == [1.0, 4.0]
    assert found["b"].values == [2.0, 3.0]
    assert found["a"].note is None


@pytest.mark.parametrize("worst", [math.inf, 0.0])
def test_a_system_that_is_lost_counts_the_worst_from_then_on_and_is_not_asked_again(worst: float) -> None:
    asked: list[str] = []

    def turn(name: str) -> float:
        asked.append(name)
        if name == "b" and asked.count("b") == 2:
            raise Lost("hung: no answer within 1 s")
        return 1.0

    found = play(["a", "b"], 4, turn, worst=worst)
    assert found["b"].values == [1.0, worst, worst, worst]
    assert found["b"].note == "round 2: hung: no answer within 1 s"
    assert asked.count("b") == 2
    assert found["a"].values == [1.0] * 4
