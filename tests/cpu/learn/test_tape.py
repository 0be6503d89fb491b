"""The tape of docs/learn: what it notes of a run, and that the pictures are of what really happens."""

from __future__ import annotations

import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.comm.algorithms import schedule
from shardwise.comm.wire import Wire

ROOT = Path(__file__).resolve().parents[3]
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(autouse=True, scope="module")
def learn() -> Iterator[None]:
    """Its modules can be imported, as on a page."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "docs" / "learn")
        yield


def by(collective: str, algorithm: str) -> Any:
    def call(tape: Any, rank: int, size: int) -> None:
        Wire(tape).run(collective, algorithm, tape.tensor, range(size), rank, combine=torch.add)

    return call


def everything(pieces: int) -> Any:
    return lambda rank: [10.0**rank] * pieces


@pytest.mark.parametrize(
    ("algorithm", "size"), [("flat", 3), ("two_shot", 4), ("ring", 3), ("halving_doubling", 4), ("tree", 6)]
)
def test_a_film_has_the_messages_of_the_schedule_and_ends_with_the_sum(algorithm: str, size: int) -> None:
    import tape

    plans = [schedule("all_reduce", algorithm, rank, size) for rank in range(size)]
    shot = tape.film(size, everything(plans[0].pieces), by("all_reduce", algorithm))
    sent = [
        (rank, m.peer, m.first, m.last) for rank, plan in enumerate(plans) for step in plan.steps for m in step.sends
    ]
    assert sorted((h.source, h.target, h.first, h.last) for h in shot.hops) == sorted(sent)
    assert len(shot.states) == 1 + max(step.round for plan in plans for step in plan.steps) + 1
    assert {value for state in shot.states[-1] for value in state} == {float("1" * size)}
    assert [set(state) for state in shot.states[0]] == [{10.0**rank} for rank in range(size)]


def test_a_message_is_one_round_after_the_last_that_its_sender_waited_for() -> None:
    import tape

    mine = (1.0,)
    first = [tape.Event("send", 1, 0, 0, 1, mine), tape.Event("arrived", 1, 0, 0, 0, mine)]
    second = [tape.Event("arrived", 0, 0, 0, 0, (0.0,)), tape.Event("send", 0, 0, 0, 1, (1.0,))]
    end = tape.Event("end", -1, 0, 0, 0, (1.0,))
    shot = tape.developed([[*first, end], [*second, end]])
    assert shot.hops == (tape.Hop(1, 0, 1, 0, 1), tape.Hop(2, 1, 0, 0, 1))
    assert shot.states == (((1.0,), (0.0,)), ((1.0,), (1.0,)), ((1.0,), (1.0,)))


def test_what_nobody_sent_cannot_have_arrived() -> None:
    import tape

    with pytest.raises(AssertionError, match="nobody sent"):
        tape.developed([[tape.Event("arrived", 1, 0, 0, 0, (1.0,))], []])


def test_only_what_lies_in_the_tensor_can_be_drawn() -> None:
    import tape

    def elsewhere(tape_of: Any, rank: int, size: int) -> None:
        with pytest.raises(AssertionError, match="must lie in"):
            tape_of.send([tape_of.tensor.clone()], 1 - rank)

    tape.film(2, everything(1), elsewhere)


def test_a_rank_that_fails_is_no_hang() -> None:
    import tape

    def fail(group: Any) -> None:
        if group.rank() == 1:
            raise SystemExit(1)

    with pytest.raises(EOFError):
        tape.on_ranks(2, fail)


def test_a_picture_has_an_arrow_for_each_message_and_a_stripe_for_each_part_of_a_sum() -> None:
    import tape

    shot = tape.film(3, everything(3), by("all_reduce", "ring"))
    drawn = xml.fromstring(tape.picture("ring & co", shot))
    tags = [each.tag.rpartition("}")[2] for each in drawn.iter()]
    assert tags.count("polygon") == len(shot.hops) == 12
    cells = [value for states in shot.states for state in states for value in state]
    assert tags.count("rect") == len(cells) + sum(sum(tape.digits(value, 3)) for value in cells)


def test_ranks_that_share_memory_read_what_two_shots_send() -> None:
    import shared

    for size in (3, 5):
        hops, sums = shared.all_reduce(size)
        plans = [schedule("all_reduce", "two_shot", rank, size) for rank in range(size)]
        sent = [
            (s.round + 1, r, m.peer, m.first, m.last) for r, p in enumerate(plans) for s in p.steps for m in s.sends
        ]
        assert [tuple(hop) for hop in hops] == sorted(sent)
        assert sums == [float("1" * size)] * size


def test_the_same_algorithm_twice_is_the_same_film() -> None:
    """Messages and their order, not times: one rank is slow the second time."""
    import tape

    def late(tape_of: Any, rank: int, size: int) -> None:
        time.sleep(0.1 * (rank == 1))
        by("all_reduce", "tree")(tape_of, rank, size)

    assert tape.film(5, everything(2), by("all_reduce", "tree")) == tape.film(5, everything(2), late)


@pytest.mark.parametrize(
    ("name", "title", "collective", "algorithm", "size", "pieces"),
    [
        ("flat", "all-reduce, flat", "all_reduce", "flat", 4, 1),
        ("ring", "all-reduce by ring", "all_reduce", "ring", 4, 4),
        ("tree", "all-reduce by two trees, half of the tensor up and down each", "all_reduce", "tree", 7, 2),
        ("reduce", "reduce by two trees", "reduce", "tree", 7, 2),
    ],
)
def test_a_kept_picture_is_what_running_gives(
    name: str, title: str, collective: str, algorithm: str, size: int, pieces: int
) -> None:
    """All of them are compared when the pages run; these few at every change."""
    import tape
    from run import on_paper

    shot = tape.film(size, everything(pieces), by(collective, algorithm))
    assert on_paper(tape.picture(title, shot)) == (PICTURES / f"04_{name}.svg").read_text()
