"""Dealing samples by speed: every sample has one worker, shares come out over time, steady speeds change nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm.deal import WINDOW, Deal, Dealing, Hands, Report, open_dealing, report

SPEEDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def shares(speeds: list[float]) -> tuple[float, ...]:
    return tuple(speed / sum(speeds) for speed in speeds)


@given(SPEEDS, SPEEDS, st.integers(1, 40), st.integers(0, 5), st.integers(1, 30))
def test_every_sample_of_a_clock_has_one_worker(
    first: list[float], second: list[float], batch: int, start: int, later: int
) -> None:
    speeds = (second * len(first))[: len(first)]
    deals = [Deal(start, shares(first)), Deal(start + later, shares(speeds))]
    hands, again = Hands(batch, deals), Hands(batch, deals)
    got = [[0] * len(first) for _ in deals]
    for clock in range(start, start + later + 30):
        runs = hands.of(clock)
        assert [i for run in runs for i in run] == list(range(batch))
        number = int(clock >= start + later)
        got[number] = [total + len(run) for total, run in zip(got[number], runs, strict=True)]
    for deal, clocks, sizes in zip(deals, (later, 30), got, strict=True):
        for share, size in zip(deal.shares, sizes, strict=True):
            assert abs(size - share * batch * clocks) < 2.5, "what rounding takes is given back"
    assert again.of(start + later + 29) == runs, "the run of a clock does not depend on what was asked before"
    assert hands.of(start) == again.of(start), "and may be asked again"


def test_equal_shares_are_as_even_as_they_can_be() -> None:
    hands = Hands(7, [Deal(0, (1 / 3,) * 3)])
    assert all({len(run) for run in hands.of(clock)} <= {2, 3} for clock in range(50))
    assert all([len(run) for run in Hands(8, [Deal(0, (0.5, 0.5))]).of(clock)] == [4, 4] for clock in range(5))


def test_a_worker_with_less_than_a_sample_a_clock_gets_one_now_and_then() -> None:
    hands = Hands(8, [Deal(0, (0.95, 0.05))])
    given_ = [len(hands.of(clock)[1]) for clock in range(20)]
    assert set(given_) == {0, 1}
    assert sum(given_) == 8


def measured(state: Dealing, speeds: list[float], clocks: int, start: int) -> Dealing:
    """Every worker reports so many clocks, of the samples that an even deal gives it, and knows the newest deal."""
    for _ in range(clocks):
        for worker, speed in enumerate(speeds):
            state = report(state, Report(worker, 8, 8 / speed, len(state.deals) - 1), start)
    return state


def test_a_slow_worker_gets_less_once_it_was_measured() -> None:
    state = measured(open_dealing(2, 0), [4.0, 1.0], WINDOW - 1, 10)
    assert len(state.deals) == 1
    state = measured(state, [4.0, 1.0], 1, 11)
    assert state.deals[-1] == Deal(11, (0.8, 0.2))


def test_like_speeds_keep_the_even_deal() -> None:
    assert len(measured(open_dealing(2, 0), [1.0, 1.05], 5 * WINDOW, 10).deals) == 1


def test_nothing_is_dealt_before_everybody_knows_the_last_deal() -> None:
    state = measured(open_dealing(2, 0), [4.0, 1.0], WINDOW, 10)
    for _ in range(20):
        state = report(state, Report(0, 8, 1.0, 1), 30)
        state = report(state, Report(1, 8, 1.0, 0), 30)
    assert len(state.deals) == 2
    state = report(state, Report(1, 8, 1.0, 1), 31)
    assert len(state.deals) == 3
    assert state.deals[-1].start == 31


def test_a_deal_of_clocks_that_were_dealt_already_is_refused() -> None:
    hands = Hands(8, [Deal(0, (0.5, 0.5))])
    hands.of(5)
    with pytest.raises(ValueError, match="clock 5"):
        hands.add(Deal(5, (0.8, 0.2)))
    hands.add(Deal(6, (0.8, 0.2)))
    assert [len(run) for run in hands.of(6)] == [6, 2]
    assert [len(run) for run in hands.of(5)] == [4, 4]
