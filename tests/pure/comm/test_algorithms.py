"""The schedules, run by hand on tuples: the right result, each piece sent as often as it must be, one order of sums."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from shardwise.comm.algorithms import Schedule, schedule
from shardwise.errors import SpecError
from shardwise.spec.collective_cost import ALGORITHMS

PAIRS = [(collective, algorithm) for collective, known in ALGORITHMS.items() for algorithm in known]
SIZES = [*range(2, 18), 24, 31]

# A sum is written down as it is made: ("+", left, right); the share of rank r in piece i is (r, i).
Term = Any


def play(schedules: list[Schedule], start: list[list[Term]]) -> list[list[Term]]:
    """What each rank holds in the end. Messages of a round carry what their senders held when it began."""
    held = [list(pieces) for pieces in start]
    for at in sorted({step.round for each in schedules for step in each.steps}):
        steps = {r: step for r, each in enumerate(schedules) for step in each.steps if step.round == at}
        letters = {
            (r, m.peer, m.first, m.last, m.add): held[r][m.first : m.last]
            for r, step in steps.items()
            for m in step.sends
        }
        before = [list(pieces) for pieces in held]
        for r, step in steps.items():
            sums: dict[int, list[tuple[int, Term]]] = {}
            for m in step.receives:
                for i, term in enumerate(letters.pop((m.peer, r, m.first, m.last, m.add)), m.first):
                    if m.add:
                        sums.setdefault(i, []).append((m.peer, term))
                    else:
                        held[r][i] = term
            for i, terms in sums.items():
                ordered = [term for _, term in sorted([*terms, (r, before[r][i])], key=lambda pair: pair[0])]
                total = ordered[0]
                for term in ordered[1:]:
                    total = ("+", total, term)
                held[r][i] = total
        assert not letters, f"round {at}: nobody takes {list(letters)}"
    return held


def leaves(term: Term) -> list[tuple[int, int]]:
    return leaves(term[1]) + leaves(term[2]) if term[0] == "+" else [term]


def complete(term: Term, size: int, piece: int) -> bool:
    return sorted(leaves(term)) == [(r, piece) for r in range(size)]


def run(collective: str, algorithm: str, size: int, root: int = 0) -> tuple[list[Schedule], list[list[Term]]]:
    schedules = [schedule(collective, algorithm, rank, size, root) for rank in range(size)]
    pieces = schedules[0].pieces
    return schedules, play(schedules, [[(r, i) for i in range(pieces)] for r in range(size)])


@pytest.mark.parametrize("algorithm", ALGORITHMS["all_reduce"])
@pytest.mark.parametrize("size", SIZES)
def test_all_reduce_sums_every_share_once_and_in_one_order_everywhere(algorithm: str, size: int) -> None:
    _, held = run("all_reduce", algorithm, size)
    assert all(complete(term, size, i) for i, term in enumerate(held[0]))
    assert all(pieces == held[0] for pieces in held)


@pytest.mark.parametrize("algorithm", ALGORITHMS["reduce_scatter"])
@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_gives_each_rank_its_sum(algorithm: str, size: int) -> None:
    schedules, held = run("reduce_scatter", algorithm, size)
    assert schedules[0].pieces == size
    assert all(complete(held[r][r], size, r) for r in range(size))


@pytest.mark.parametrize("algorithm", ALGORITHMS["all_gather"])
@pytest.mark.parametrize("size", SIZES)
def test_all_gather_gives_everybody_every_piece(algorithm: str, size: int) -> None:
    schedules = [schedule("all_gather", algorithm, rank, size) for rank in range(size)]
    assert schedules[0].pieces == size
    held = play(schedules, [[i if i == r else None for i in range(size)] for r in range(size)])
    assert held == [list(range(size))] * size


@pytest.mark.parametrize("algorithm", ALGORITHMS["broadcast"])
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_gives_everybody_the_roots(algorithm: str, size: int) -> None:
    for root in {0, 1, size // 2, size - 1}:
        _, held = run("broadcast", algorithm, size, root)
        assert all(pieces == held[root] for pieces in held)
        assert held[root] == [(root, i) for i in range(len(held[root]))]


@pytest.mark.parametrize("algorithm", ALGORITHMS["reduce"])
@pytest.mark.parametrize("size", SIZES)
def test_reduce_gives_the_root_the_sum(algorithm: str, size: int) -> None:
    for root in {0, 1, size // 2, size - 1}:
        _, held = run("reduce", algorithm, size, root)
        assert all(complete(term, size, i) for i, term in enumerate(held[root]))


def sent(schedules: list[Schedule]) -> tuple[Counter[int], float]:
    """How often each piece is sent, and how many tensors that is together."""
    pieces: Counter[int] = Counter()
    for each in schedules:
        for step in each.steps:
            for message in step.sends:
                pieces.update(range(message.first, message.last))
    return pieces, sum(pieces.values()) / schedules[0].pieces


@pytest.mark.parametrize("size", SIZES)
def test_every_piece_is_sent_as_often_as_the_algorithm_says(size: int) -> None:
    p, q = size, 1 << (size.bit_length() - 1)
    doubled = 2 * (q - 1) + 2 * (p - q)  # a folded rank sends everything once and is told everything once
    expected = {
        ("all_reduce", "flat"): p * (p - 1),
        ("all_reduce", "two_shot"): 2 * (p - 1),
        ("all_reduce", "ring"): 2 * (p - 1),
        ("all_reduce", "tree"): 2 * (p - 1),
        ("all_reduce", "halving_doubling"): doubled,
        ("reduce_scatter", "flat"): p - 1,
        ("reduce_scatter", "ring"): p - 1,
        ("all_gather", "flat"): p - 1,
        ("all_gather", "ring"): p - 1,
    }
    expected |= {(c, a): p - 1 for c in ("broadcast", "reduce") for a in ("flat", "tree", "ring")}
    for (collective, algorithm), times in expected.items():
        pieces, _ = sent([schedule(collective, algorithm, rank, size) for rank in range(size)])
        assert set(pieces.values()) == {times}, (collective, algorithm, pieces)
    for collective in ("broadcast", "reduce"):  # log2(q) times down or up a binomial tree, but the root's own piece
        _, tensors = sent([schedule(collective, "halving_doubling", rank, size) for rank in range(size)])
        assert tensors == pytest.approx((q.bit_length() - 1) / 2 + (q - 1) + (p - q))


@pytest.mark.parametrize(("collective", "algorithm"), PAIRS)
@pytest.mark.parametrize("size", SIZES)
def test_both_ends_of_a_message_agree_on_its_round(collective: str, algorithm: str, size: int) -> None:
    schedules = [schedule(collective, algorithm, rank, size) for rank in range(size)]
    out = [(s.round, r, m.peer, m.first, m.last) for r, e in enumerate(schedules) for s in e.steps for m in s.sends]
    into = [(s.round, m.peer, r, m.first, m.last) for r, e in enumerate(schedules) for s in e.steps for m in s.receives]
    assert sorted(out) == sorted(into)
    assert len(set(out)) == len(out)
    assert all(source != target for _, source, target, _, _ in out)


def test_one_rank_has_nothing_to_do() -> None:
    for collective, algorithm in PAIRS:
        assert schedule(collective, algorithm, 0, 1).steps == ()


def test_nobody_is_inner_in_both_trees() -> None:
    for size in range(2, 66):
        feeding = [set(), set()]  # type: list[set[int]]
        for rank in range(size):
            for step in schedule("all_reduce", "tree", rank, size).steps:
                for message in step.receives:
                    if message.add:
                        feeding[message.first].add(rank)
        assert not feeding[0] & feeding[1]


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(SpecError, match="no all_gather by 'tree'; there is flat, halving_doubling, ring"):
        schedule("all_gather", "tree", 0, 4)
    with pytest.raises(SpecError, match="there is all_gather, all_reduce"):
        schedule("sort", "ring", 0, 4)
