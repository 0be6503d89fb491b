"""Which synchronisation `auto` picks from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.plan.auto_sync import CHECK_SHARE, LOCAL, Measured, choose
from shardwise.spec.sync import Sync

EXACT = Sync(bucket_bytes=1_000_000)
BOTH = ("local", "compressed")


def measured(mbit: float, *, compute_s: float = 0.025, elements: int = 1_000_000, latency_s: float = 1e-4) -> Measured:
    bandwidth = mbit * 1e6 / 8
    return Measured(compute_s, compute_s + 4 * elements / bandwidth, latency_s, bandwidth, elements, 2, True)


@pytest.mark.parametrize(
    ("mbit", "allow", "word"),
    [
        (100_000, BOTH, "all_reduce"),
        (100, (), "all_reduce"),
        (100, BOTH, "local"),
        (10, BOTH, "local"),
        (100, ("compressed",), "compressed"),
    ],
)
def test_the_gentlest_word_that_is_fast_enough_is_picked(mbit: float, allow: tuple[str, ...], word: str) -> None:
    assert choose(measured(mbit), allow, EXACT).sync.word == word


def test_compression_is_enough_where_it_hides_the_link() -> None:
    assert choose(measured(10_000, compute_s=0.1), BOTH, EXACT).sync.word == "all_reduce"
    assert choose(measured(1_000, compute_s=0.3), BOTH, EXACT).sync.word == "compressed"


def test_replicas_meet_less_often_the_slower_the_link_is_but_not_too_seldom() -> None:
    syncs = [choose(measured(mbit), ("local",), EXACT).sync for mbit in (1000, 100, 10, 1)]
    ladder = [LOCAL.index((s.every, s.bits, s.fragments if s.method == "streaming" else 1)) for s in syncs]
    assert ladder == sorted(ladder)
    assert ladder[-1] == len(LOCAL) - 1
    assert all(0 < sync.overlap < sync.every for sync in syncs)


def test_adams_moments_are_bounded_where_there_are_any() -> None:
    with_moments = choose(measured(100), ("local",), EXACT).sync
    without = choose(measured(100)._replace(moments=False), ("local",), EXACT).sync
    assert (with_moments.beta1, with_moments.beta2) == (0.8, 0.99)
    assert (without.beta1, without.beta2) == (0.0, 0.0)


def test_it_says_what_it_saw_and_expects() -> None:
    why = choose(measured(100), BOTH, EXACT).why
    for said in ("25.0 ms", "100 Mbit/s", "So: local streaming every 4 steps in 2 bits and 2 fragments"):
        assert said in why


@given(st.floats(1, 1e6), st.floats(1e-4, 1), st.integers(1000, 10**9), st.sets(st.sampled_from(BOTH)))
def test_only_what_is_allowed_is_picked_and_checks_stay_cheap(
    mbit: float, compute_s: float, elements: int, allow: set[str]
) -> None:
    facts = measured(mbit, compute_s=compute_s, elements=elements)
    choice = choose(facts, sorted(allow), EXACT)
    assert choice.sync.word in {"all_reduce", *allow}
    assert (choice.check_every == 0) == (choice.sync == EXACT)
    if choice.check_every:
        exact_step_s = 4 * elements / facts.bandwidth
        assert exact_step_s <= 1.01 * CHECK_SHARE * choice.check_every * compute_s
