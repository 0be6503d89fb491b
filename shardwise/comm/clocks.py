"""The clocks of a parameter server: who may start, whose gradients count, when the parameters are updated. Pure.

    clock c      a worker's c-th gradient (0-based); a worker has *finished* c once it has pushed that gradient
    done         clocks whose updates are all in the parameters: every clock below it
    bound s      a worker may start clock c when done >= c - s (Ho et al. 2013, section 2): s = 0 is synchronous

State and events in, state and actions out: no tensor, no thread, no time. Workers may join and leave between events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Rule(NamedTuple):
    """`bound`: how many clocks a worker may be ahead of the slowest (None: any number).

    Of n workers the first n - `backup` gradients of a clock count (Chen et al. 2016, section 3). With `at_once` every
    gradient is an update of its own (Dean et al. 2012); else one update is made of all gradients of a clock.
    """

    bound: int | None = 0
    backup: int = 0
    at_once: bool = False


class Push(NamedTuple):
    """A worker's gradient of `clock` has come."""

    worker: int
    clock: int


class Skip(NamedTuple):
    """A worker gives `clock` up: it was late, or its gradient does not count."""

    worker: int
    clock: int


class Pull(NamedTuple):
    """A worker wants to start `clock`; `bound` instead of the rule's: 0 waits for everything before the clock."""

    worker: int
    clock: int
    bound: int | None = None


class Join(NamedTuple):
    """A worker comes; its first clock is the first that no other worker has finished."""

    worker: int


class Leave(NamedTuple):
    """A worker has gone: what it has pushed counts, and nobody waits for it any more."""

    worker: int


class Add(NamedTuple):
    """Add the gradient just pushed to the sum of its clock."""

    worker: int
    clock: int


class Drop(NamedTuple):
    """Forget the gradient just pushed: enough others of its clock came before it."""

    worker: int
    clock: int


class Update(NamedTuple):
    """Update the parameters with `clock`: with the sum of these workers' gradients, or with one of them at once."""

    clock: int
    workers: tuple[int, ...]


class Answer(NamedTuple):
    """Let the worker start `clock`; `late` when that clock has been completed without it: it should skip it."""

    worker: int
    clock: int
    late: bool


class Admit(NamedTuple):
    """The worker that joined begins with `clock`."""

    worker: int
    clock: int


Event = Push | Skip | Pull | Join | Leave
Action = Add | Drop | Update | Answer | Admit


class Clocks(NamedTuple):
    """What is known of the workers. `finished[w]` is the clock that worker w pushes next, `first[w]` where it began.

    `arrived[c]` are the workers whose gradients of the unfinished clock c count, in the order in which they came.
    """

    rule: Rule
    done: int = 0
    first: Mapping[int, int] = {}
    finished: Mapping[int, int] = {}
    arrived: Mapping[int, tuple[int, ...]] = {}
    waiting: Mapping[int, Pull] = {}

    def behind(self) -> list[int]:
        """The workers that `done` waits for: those that have not pushed the first clock that is not done."""
        return [w for w, clock in self.finished.items() if clock <= self.done]


def begin(rule: Rule, workers: Iterable[int], clock: int = 0) -> Clocks:
    """All `workers` at `clock`."""
    started = dict.fromkeys(workers, clock)
    return Clocks(rule, clock, started, dict(started))


def advance(state: Clocks, event: Event) -> tuple[Clocks, list[Action]]:
    """What an event changes and what is to be done, in order. Raises ValueError for one that breaks the protocol."""
    match event:
        case Join(worker):
            _expect(worker not in state.finished, f"worker {worker} joined twice")
            clock = max(state.finished.values(), default=state.done)
            members = {**state.first, worker: clock}
            return state._replace(first=members, finished={**state.finished, worker: clock}), [Admit(worker, clock)]
        case Leave(worker):
            _known(state, worker)
            state = state._replace(
                first=_without(state.first, worker),
                finished=_without(state.finished, worker),
                waiting=_without(state.waiting, worker),
            )
            return _complete(state, [])
        case Pull(worker, clock):
            _known(state, worker)
            _expect(clock == state.finished[worker], f"worker {worker} asked for clock {clock} out of turn")
            return _answer(state._replace(waiting={**state.waiting, worker: event}), [])
        case Skip(worker, clock):
            _known(state, worker)
            _expect(clock == state.finished[worker], f"worker {worker} skipped clock {clock} out of turn")
            return _answer(state._replace(finished={**state.finished, worker: clock + 1}), [])
        case Push(worker, clock):
            _known(state, worker)
            _expect(clock == state.finished[worker], f"worker {worker} pushed clock {clock} out of turn")
            return _pushed(state, worker, clock)


def _pushed(state: Clocks, worker: int, clock: int) -> tuple[Clocks, list[Action]]:
    state = state._replace(finished={**state.finished, worker: clock + 1})
    if clock < state.done:
        return _answer(state, [Drop(worker, clock)])
    came = (*state.arrived.get(clock, ()), worker)
    state = state._replace(arrived={**state.arrived, clock: came})
    return _complete(state, [Update(clock, (worker,)) if state.rule.at_once else Add(worker, clock)])


def _complete(state: Clocks, actions: list[Action]) -> tuple[Clocks, list[Action]]:
    """Finish the clocks that have all their gradients, in order; then answer whom that lets go."""
    while (came := state.arrived.get(state.done, ())) and _enough(state, came):
        if not state.rule.at_once:
            actions.append(Update(state.done, came))
        state = state._replace(done=state.done + 1, arrived=_without(state.arrived, state.done))
    return _answer(state, actions)


def _enough(state: Clocks, came: tuple[int, ...]) -> bool:
    """Whoever pushed and left counts as expected."""
    expected = {w for w, clock in state.first.items() if clock <= state.done} | set(came)
    return len(came) >= len(expected) - state.rule.backup


def _answer(state: Clocks, actions: list[Action]) -> tuple[Clocks, list[Action]]:
    for worker, pull in list(state.waiting.items()):
        bound = state.rule.bound if pull.bound is None else pull.bound
        if bound is not None and state.done < pull.clock - bound:
            continue
        state = state._replace(waiting=_without(state.waiting, worker))
        actions.append(Answer(worker, pull.clock, pull.clock < state.done))
    return state, actions


def _without(mapping: Mapping[int, T], key: int) -> dict[int, T]:
    return {k: v for k, v in mapping.items() if k != key}


def _known(state: Clocks, worker: int) -> None:
    _expect(worker in state.finished, f"worker {worker} is not a member")


def _expect(right: bool, otherwise: str) -> None:
    if not right:
        raise ValueError(otherwise)
