"""When ranks are ended: every order of exits, stop signals and times."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.cluster.fake import FakeLauncher, FakeStarter, Script
from shardwise.cluster.ranks import RankExits, run_ranks
from shardwise.cluster.supervision import KILL_LIMIT_S, SETTLE_S, Supervision
from shardwise.errors import ClusterError, CommError

GRACE_S = 3.0
NEVER = Script(at_s=None)
STUBBORN = Script(at_s=None, ignores=(signal.SIGTERM,))


def play(
    scripts: Sequence[Script], folder: Path, on_poll: Callable[[], None] = lambda: None
) -> tuple[RankExits, FakeStarter]:
    starter = FakeStarter(scripts)
    exits = run_ranks(
        starter,
        "a.b:c",
        lambda rank: {"mine": rank},
        len(scripts),
        logs=folder,
        grace_s=GRACE_S,
        clock=starter.clock,
        on_poll=on_poll,
    )
    return exits, starter


steps = st.lists(
    st.one_of(
        st.tuples(st.just("exit"), st.integers(0, 3), st.integers(-15, 15)),
        st.tuples(st.just("stop"), st.sampled_from([2, 15]), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
    ),
    max_size=30,
)


@given(steps)
def test_ranks_are_ended_exactly_when_there_is_a_reason(script: list[tuple[str, int, int]]) -> None:
    watch = Supervision(4, GRACE_S)
    live, now, stops, failed_at = {0, 1, 2, 3}, 0.0, 0, None
    terminated_at = killed_at = None
    for what, number, status in script:
        if what == "exit" and number in live:
            live.discard(number)
            watch.exited(number, status, now)
            if status and failed_at is None:
                failed_at = now
        elif what == "stop":
            stops += 1
            watch.stop(number)
        elif what == "wait":
            now += number / 10
        action = watch.decide(now)
        assert watch.live == live
        if action == "terminate":
            assert live
            assert terminated_at is None
            assert killed_at is None
            assert stops == 1 or (failed_at is not None and now - failed_at >= SETTLE_S)
            terminated_at = now
        elif action == "kill":
            assert live
            assert killed_at is None
            assert stops > 1 or (terminated_at is not None and now - terminated_at >= GRACE_S)
            killed_at = now
        elif action == "give_up":
            assert killed_at is not None
            assert now - killed_at >= KILL_LIMIT_S
        elif live and killed_at is None:  # nothing done: nothing was due
            assert stops < 2
            assert terminated_at is not None or (not stops and (failed_at is None or now - failed_at < SETTLE_S))
            assert terminated_at is None or now - terminated_at < GRACE_S


def test_all_well(tmp_path: Path) -> None:
    exits, starter = play([Script(at_s=2.0), Script(at_s=1.0)], tmp_path)
    assert [(end.rank, end.status) for end in exits] == [(1, 0), (0, 0)]
    assert starter.signals == []
    first = starter.started[0]
    assert first.entry == "a.b:c"
    assert first.args.keys() == {"rank", "world", "port", "listen_fd", "mine"}
    assert first.args["port"] == starter.started[1].args["port"] > 0


def test_a_failure_is_followed_by_sigterm_then_sigkill(tmp_path: Path) -> None:
    exits, starter = play([STUBBORN, Script(at_s=1.0, status=3), NEVER], tmp_path)
    assert [(end.rank, end.status, end.ended_by_launcher) for end in exits] == [
        (1, 3, False),
        (2, -15, True),
        (0, -9, True),
    ]
    kinds = [(pid, number) for _, pid, number in starter.signals]
    assert kinds == [(1, 15), (3, 15), (1, 9)]
    times = [at for at, _, _ in starter.signals]
    assert 1.0 + SETTLE_S <= times[0] < 1.5 + SETTLE_S
    assert times[0] + GRACE_S <= times[2] < times[0] + GRACE_S + 0.5


def test_ranks_that_fail_together_are_all_asked_before_they_are_ended(tmp_path: Path) -> None:
    exits, starter = play([Script(at_s=1.0 + SETTLE_S / 2, status=5), Script(at_s=1.0, status=-9)], tmp_path)
    assert starter.signals == []
    assert [(end.rank, end.ended_by_launcher) for end in exits] == [(1, False), (0, False)]


def test_a_rank_that_only_lost_touch_is_not_to_blame(tmp_path: Path) -> None:
    def told() -> None:
        lost = {"kind": "CommError", "message": "rank 1 is gone.", "exit_code": 10}
        (tmp_path / "rank-0.error.json").write_text(json.dumps(lost))

    exits, _ = play([Script(at_s=1.0, status=10), Script(at_s=1.1, status=-11)], tmp_path, told)
    assert [end.rank for end in exits] == [0, 1]
    assert exits.first_failure is exits[1]
    exits, _ = play([Script(at_s=1.0, status=10), NEVER], tmp_path, told)
    failure = exits.failure()
    assert isinstance(failure, CommError)
    assert str(failure) == "rank 1 is gone."


def test_an_error_of_an_earlier_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "rank-0.error.json").write_text('{"kind": "DataError", "message": "old.", "exit_code": 4}')
    exits, _ = play([Script(status=1)], tmp_path)
    assert exits[0].error is None


def test_a_rank_that_even_sigkill_does_not_end_is_named(tmp_path: Path) -> None:
    undead = Script(at_s=None, ignores=(signal.SIGTERM, signal.SIGKILL))
    starter = FakeStarter([Script(status=1), undead])

    def run() -> None:
        run_ranks(starter, "a:b", lambda rank: {}, 2, logs=tmp_path, grace_s=GRACE_S, clock=starter.clock)

    with pytest.raises(ClusterError, match=r"rank 1 \(pid 2\) is still there 15 s after SIGKILL"):
        run()


def test_the_fake_launcher_plays_its_script(tmp_path: Path) -> None:
    launcher = FakeLauncher([Script(at_s=1.0, status=4), NEVER])
    exits = launcher.run("a:b", lambda rank: {}, 2, logs=tmp_path)
    assert [(end.rank, end.status) for end in exits] == [(0, 4), (1, -15)]
    launcher.close()
    assert launcher.starter.closed


def test_the_fake_starter_keeps_the_ends_of_others() -> None:
    starter = FakeStarter([Script(at_s=1.0, status=1), Script(at_s=2.0)])
    one, two = (starter.fork("a:b", {}, env={}, threads=1, stdout=None) for _ in range(2))
    assert starter.wait_for(two.pid, 10.0) == 0
    assert starter.wait(0.0) == [(one.pid, 1)]
