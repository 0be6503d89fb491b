"""`sync=auto`: exact until it has measured, then what was chosen, with exact steps that may end it."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch

from shardwise import events
from shardwise.parallel import auto
from shardwise.parallel.loss_band import WINDOW, LossBand
from shardwise.parallel.parallelize import parallelize
from shardwise.parallel.step import step
from shardwise.plan.auto_sync import Choice
from shardwise.spec.plan import Plan
from shardwise.spec.sync import Sync
from tests.cpu.parallel import jobs
from tests.ranks import Rank, run_ranks

SAMPLES = 12


def run(rank: Rank, steps: int, check_every: int, spoil_at: int) -> Any:
    """Losses and parameters after each step, and the events; the targets are spoilt from a step on."""
    auto.SETTLING, auto.MEASURING = 1, 3
    chosen = Sync(word="local", method="sgd", every=4)
    auto.choose = lambda measured, allow, exact: Choice(chosen, check_every, f"{allow} {measured.ranks} ranks")
    module = jobs.net()
    plan = Plan(data=rank.world, sync=Sync(word="auto"))
    replica = parallelize(module, plan, rank.mesh(plan), allow=("local",))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    seen: list[dict[str, Any]] = []
    found = []
    with events.sink(seen.append):
        for s in range(steps):
            micro = jobs.share(s % 3, SAMPLES, rank.rank, rank.world, 1)
            if spoil_at and s >= spoil_at:
                micro[0].batch["targets"].mul_(100.0)
            result = step(replica, [optimizer], micro, loss=jobs.loss)
            found.append((result.loss, jobs.values(module)))
    return found, seen


def alike(one: Any, two: Any) -> list[bool]:
    return [mine == theirs for (_, mine), (_, theirs) in zip(one, two, strict=True)]


def test_it_begins_exact_and_then_does_what_was_chosen() -> None:
    (one, seen), (two, _) = run_ranks(2, run, 14, 0, 0)
    assert alike(one, two) == [True] * 4 + [False, False, False, True] * 2 + [False, False]
    assert [loss for loss, _ in one[:4]] == [loss for loss, _ in two[:4]]
    (event,) = seen
    assert (event["event"], event["word"], event["every"]) == ("sync_chosen", "local", 4)
    assert "('local',) 2 ranks" in event["why"]


def test_replicas_meet_for_an_exact_step_from_time_to_time() -> None:
    (one, _), (two, _) = run_ranks(2, run, 14, 3, 0)
    # chosen after step 4; they meet after 8 and 12, and after 7, 10 and 13 for the exact steps 8, 11 and 14, which have
    # one loss and leave them alike
    assert [s + 1 for s, same in enumerate(alike(one, two)) if same] == [1, 2, 3, 4, 7, 8, 10, 11, 12, 13, 14]
    assert [s + 1 for s in range(14) if one[s][0] == two[s][0]] == [1, 2, 3, 4, 8, 11, 14]


def test_where_steps_are_long_few_are_enough() -> None:
    (one, seen), (two, _) = run_ranks(2, run_slowly, 8)
    assert alike(one, two) == [True] * 3 + [False, False, False, True, False]
    assert len(seen) == 1


def run_slowly(rank: Rank, steps: int) -> Any:
    auto.FEW, auto.LONG_S = 2, 0.0
    return run(rank, steps, 0, 0)


def test_it_gives_up_when_the_loss_leaves_its_band() -> None:
    found = run_ranks(2, run, 2 * WINDOW + 30, 4, 2 * WINDOW)
    reasons = [e["why"] for _, seen in found for e in seen if e["event"] == "sync_given_up"]
    assert reasons
    (one, _), (two, _) = found
    assert all(alike(one, two)[-8:])


def test_a_band_knows_noise_from_harm() -> None:
    band = LossBand()
    assert band.left(9.0) == ""  # nothing is known yet
    for s in range(3 * WINDOW):
        band.add(2.0 - s / 300 + 0.1 * math.sin(s))
    assert band.left(1.6) == ""
    assert "above" in band.left(2.5)
    assert "finite" in band.left(math.nan)
    for _ in range(WINDOW):
        band.add(1.9)
    assert "rose" in band.left(1.9)


def test_the_noise_of_small_batches_stays_inside() -> None:
    random = Random(0)
    band = LossBand()
    for s in range(20_000):
        band.add(random.gauss(2.0, 0.4))
        if s % 500 == 499:
            assert band.left(random.gauss(2.0, 0.2)) == ""
    for _ in range(WINDOW):
        band.add(random.gauss(2.6, 0.4))
    assert "rose" in band.left(2.6)


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_outside_at_once(loss: float) -> None:
    assert LossBand().left(loss)
