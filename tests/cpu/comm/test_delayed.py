"""Sums that arrive a step late: which step's they are, over a new layout, a checkpoint and an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.comm.delayed import Delayed
from shardwise.comm.exchange import Bucketed, Pending, Piece
from shardwise.comm.group import Group
from shardwise.errors import CommError
from tests.ranks import Rank, run_ranks

SIZES = (3, 5)


class Plain:
    """An exchange that loses nothing, and notes when it was exact."""

    def __init__(self, group: Group, fail_at: int = 0) -> None:
        self.group, self.exact, self.seen, self.fail_at = group, False, [], fail_at

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        return None

    def start(self, number: int, flat: Tensor, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        self.seen.append((number, self.exact))
        if len(self.seen) == self.fail_at:
            raise CommError("rank 1 died")
        return self.group.all_reduce(flat)

    def state(self) -> dict[str, Tensor]:
        return {"inner": torch.ones(1)}

    def load_state(self, ranks: Sequence[Mapping[str, Tensor]], rank: int) -> None:
        assert [set(state) for state in ranks] == [{"inner"}] * len(ranks)

    def close(self) -> None:
        return None


def layout(turned: bool = False) -> list[Bucketed]:
    names = ("b", "a") if turned else ("a", "b")
    sizes = {"a": SIZES[0], "b": SIZES[1]}
    return [
        Bucketed(sizes[name] + 1, torch.float32, torch.device("cpu"), (Piece(name, 0, (sizes[name],)),))
        for name in names
    ]


def a_step(late: Delayed, buckets: list[Bucketed], value: float) -> dict[str, float]:
    """One step whose gradients are `value`; what came, by parameter, and the tail."""
    flats = []
    for number, bucket in enumerate(buckets):
        flat = torch.full((bucket.numel + 2 * (number == 1),), value)
        flats.append((flat, late.start(number, flat, flat[: bucket.numel], flat[bucket.numel :], mean=False)))
    found = {}
    for (flat, work), bucket in zip(flats, buckets, strict=True):
        work.wait()
        (piece,) = bucket.pieces
        assert (flat[: piece.shape[0]] == flat[0]).all()
        found[piece.name] = flat[0].item()
    return found | {"tail": flat[-1].item()}


def same(value: float) -> dict[str, float]:
    return {"a": value, "b": value, "tail": value}


def late_steps(rank: Rank) -> Any:
    group = rank.mesh().axis("data").group
    assert group is not None
    plain = Plain(group)
    late = Delayed(plain, start=2)
    late.arrange(layout())
    found = [a_step(late, layout(), float(value)) for value in (1, 2, 3, 4)]
    late.arrange(layout(turned=True))
    found += [a_step(late, layout(turned=True), float(value)) for value in (5, 6)]
    late.exact = True
    found.append(a_step(late, layout(turned=True), 7.0))
    late.exact = False
    found += [a_step(late, layout(turned=True), float(value)) for value in (8, 9)]
    kept = late.state()
    late.close()
    again = Delayed(Plain(group))
    again.arrange(layout())
    again.load_state([kept, kept], rank.rank)
    found.append(a_step(again, layout(), 10.0))
    again.close()
    return found, [exact for number, exact in plain.seen if number == 0]


def test_sums_come_a_step_late_but_for_exact_steps() -> None:
    for found, exact in run_ranks(2, late_steps):
        # 2 ranks: every sum is twice the value. Steps 1 and 2 are exact; in step 3 nothing is there yet; the layout
        # changes after step 4; step 7 is exact and what was late waits; step 10 goes on from a checkpoint.
        assert found == [same(2.0 * value) for value in (1, 2, 0, 3, 4, 5, 7, 6, 8, 9)]
        assert exact == [True, True, False, False, False, False, True, False, False]


def failing(rank: Rank) -> str:
    group = rank.mesh().axis("data").group
    assert group is not None
    late = Delayed(Plain(group, fail_at=5))
    late.arrange(layout())
    a_step(late, layout(), 1.0)
    a_step(late, layout(), 2.0)
    a_step(late, layout(), 3.0)
    with pytest.raises(CommError) as caught:
        a_step(late, layout(), 4.0)
    late.close()
    return str(caught.value)


def test_what_fails_on_the_way_is_raised_a_step_later() -> None:
    assert run_ranks(2, failing) == ["rank 1 died"] * 2
