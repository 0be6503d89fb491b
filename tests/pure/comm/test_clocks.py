"""The clocks of a parameter server, driven by every order of events that hypothesis finds."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.comm.clocks import (
    Action,
    Add,
    Admit,
    Answer,
    Clocks,
    Drop,
    Join,
    Leave,
    Pull,
    Push,
    Rule,
    Skip,
    Update,
    advance,
    begin,
)


class World:
    """Workers that pull, compute and push in any interleaving, as `draw` chooses; what the clocks allow is checked."""

    def __init__(self, rule: Rule, workers: int) -> None:
        self.rule = rule
        self.state: Clocks = begin(rule, list(range(workers)))
        self.clock = dict.fromkeys(range(workers), 0)  # that each is at
        self.phase = dict.fromkeys(range(workers), "idle")  # idle, waiting, computing
        self.counted: dict[int, list[int]] = defaultdict(list)
        self.dropped: list[tuple[int, int]] = []
        self.updates: list[tuple[int, tuple[int, ...]]] = []
        self.computed: list[tuple[int, int]] = []
        self.next_worker = workers

    def feed(self, event: Any) -> None:
        self.state, actions = advance(self.state, event)
        for action in actions:
            self.act(action)

    def act(self, action: Action) -> None:
        match action:
            case Add(worker, clock):
                self.counted[clock].append(worker)
            case Drop(worker, clock):
                self.dropped.append((worker, clock))
            case Update(clock, workers):
                if self.rule.at_once:
                    self.counted[clock] += workers
                self.updates.append((clock, workers))
            case Admit(worker, clock):
                self.clock[worker], self.phase[worker] = clock, "idle"
            case Answer(worker, clock, late):
                assert self.phase[worker] == "waiting"
                assert self.clock[worker] == clock
                if self.rule.bound is not None:
                    done = self.done()
                    assert done >= clock - self.rule.bound, "started too early"
                assert late == (clock < self.done())
                self.phase[worker] = "late" if late else "computing"

    def done(self) -> int:
        """Clocks whose updates are all there, counted from what was updated and not from the state."""
        if not self.rule.at_once:
            return len(self.updates)
        return self.state.done

    def move(self, worker: int) -> None:
        if self.phase[worker] == "idle":
            self.phase[worker] = "waiting"
            self.feed(Pull(worker, self.clock[worker]))
        elif self.phase[worker] == "computing":
            clock = self.clock[worker]
            self.clock[worker], self.phase[worker] = clock + 1, "idle"
            self.computed.append((worker, clock))
            self.feed(Push(worker, clock))

        elif self.phase[worker] == "late":
            clock = self.clock[worker]
            self.dropped.append((worker, clock))
            self.clock[worker], self.phase[worker] = clock + 1, "idle"
            self.feed(Skip(worker, clock))

    def movable(self) -> list[int]:
        return sorted(w for w, phase in self.phase.items() if phase != "waiting")

    def join(self) -> None:
        self.clock[self.next_worker], self.phase[self.next_worker] = -1, "idle"
        self.feed(Join(self.next_worker))
        self.next_worker += 1

    def leave(self, worker: int) -> None:
        del self.clock[worker], self.phase[worker]
        self.feed(Leave(worker))


RULES = st.one_of(
    st.integers(0, 4).map(lambda bound: Rule(bound)),
    st.one_of(st.none(), st.integers(0, 3)).map(lambda bound: Rule(bound, at_once=True)),
)


@settings(max_examples=100)
@given(RULES, st.integers(1, 4), st.data())
def test_every_gradient_counts_once_and_nobody_runs_ahead(rule: Rule, workers: int, data: st.DataObject) -> None:
    world = World(rule, workers)
    for _ in range(data.draw(st.integers(0, 60))):
        assert world.movable(), f"everybody waits: {world.state}"
        world.move(data.draw(st.sampled_from(world.movable())))
        if rule.bound is not None:
            ahead = max(world.clock.values()) - min(world.clock.values())
            assert ahead <= rule.bound + 1
    counted = Counter((w, c) for c, ws in world.counted.items() for w in ws)
    assert counted == Counter(world.computed)
    assert not world.dropped
    clocks = [clock for clock, _ in world.updates]
    if not rule.at_once:
        assert clocks == list(range(len(clocks))), "updates come in order, each clock once"
        for clock, members in world.updates:
            assert sorted(members) == list(range(workers))
            assert members == tuple(world.counted[clock])
    assert world.state.done == min(world.clock.values())


@settings(max_examples=100)
@given(st.integers(2, 4), st.data())
def test_backup_workers_are_not_waited_for(workers: int, data: st.DataObject) -> None:
    backup = data.draw(st.integers(1, workers - 1))
    world = World(Rule(bound=0, backup=backup), workers)
    for _ in range(data.draw(st.integers(0, 60))):
        assert world.movable()
        world.move(data.draw(st.sampled_from(world.movable())))
    for clock, members in world.updates:
        assert len(members) == workers - backup
        assert list(members) == world.counted[clock]
    counted = [(w, c) for c, ws in world.counted.items() for w in ws]
    finished = [(w, c) for w, clock in world.clock.items() for c in range(clock)]
    assert sorted(counted + world.dropped) == sorted(finished), "each worker's clock counts or is reported as dropped"


def test_a_stopped_worker_does_not_stop_the_others_where_it_is_backup() -> None:
    world = World(Rule(backup=1), 3)
    world.move(2)  # worker 2 begins clock 0 and never ends it
    for _ in range(20):
        world.move(0), world.move(1)
    assert world.state.done == 10
    world.move(2)
    assert world.dropped == [(2, 0)]
    world.move(2), world.move(2)
    assert world.dropped[-1] == (2, 1), "what is over is not computed any more"


@settings(max_examples=100)
@given(RULES, st.integers(1, 3), st.data())
def test_workers_may_join_and_leave(rule: Rule, workers: int, data: st.DataObject) -> None:
    world = World(rule, workers)
    for _ in range(data.draw(st.integers(0, 60))):
        what = data.draw(st.sampled_from(["move", "move", "move", "join", "leave"]))
        if what == "join" and len(world.clock) < 5:
            world.join()
        elif what == "leave" and len(world.clock) > 1:
            world.leave(data.draw(st.sampled_from(sorted(world.clock))))
        elif world.movable():
            world.move(data.draw(st.sampled_from(world.movable())))
        assert world.movable(), f"everybody waits: {world.state}"
    counted = Counter((w, c) for c, ws in world.counted.items() for w in ws)
    assert counted == Counter(world.computed)
    assert [c for c, _ in world.updates] == list(range(len(world.updates))) or rule.at_once


def test_leaving_completes_what_waited_for_it() -> None:
    state = begin(Rule(), [0, 1])
    state, _ = advance(state, Push(0, 0))
    state, actions = advance(state, Pull(0, 1))
    assert actions == []
    assert state.behind() == [1]
    state, actions = advance(state, Leave(1))
    assert actions == [Update(0, (0,)), Answer(0, 1, False)]


def test_a_drain_waits_for_everything_before_the_clock() -> None:
    state = begin(Rule(bound=3), [0, 1])
    state, _ = advance(state, Push(0, 0))
    state, actions = advance(state, Pull(0, 1, bound=0))
    assert actions == []
    state, actions = advance(state, Push(1, 0))
    assert actions == [Add(1, 0), Update(0, (0, 1)), Answer(0, 1, False)]


@pytest.mark.parametrize("event", [Push(0, 1), Pull(0, 1), Push(7, 0), Skip(0, 1), Leave(7), Join(0)])
def test_what_breaks_the_protocol_is_refused(event: Any) -> None:
    with pytest.raises(ValueError, match="worker"):
        advance(begin(Rule(), [0, 1]), event)
