"""Where ranks find each other: addresses, restarts and errors of the store."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from shardwise.comm.store import LOOPBACK, environment_store, listen, open_store, own_address
from shardwise.errors import CommError
from tests.ranks import Rank, RankFailed, run_ranks


def free_port() -> int:
    with listen() as listener:
        return int(listener.getsockname()[1])


def from_environment(rank: Rank, port: int) -> tuple[str, Any]:
    store = environment_store(rank.rank, rank.world, LOOPBACK, port, 20, environ={})
    store.set(f"hello/{rank.rank}", "x")
    store.wait([f"hello/{r}" for r in range(rank.world)])
    refused = ""
    if rank.rank == 0:
        with socket.socket() as stranger:
            stranger.settimeout(1)
            try:
                stranger.connect(("127.0.0.2", port))  # a socket on every address would take this
            except OSError as error:
                refused = type(error).__name__
    address = own_address(store, rank.rank, rank.world)
    if rank.rank == 0:
        store.wait([f"bye/{r}" for r in range(1, rank.world)])  # it serves the store
    else:
        store.set(f"bye/{rank.rank}", "x")
    return address, refused


def test_ranks_of_another_launcher_meet_on_the_masters_address_alone() -> None:
    found = run_ranks(2, from_environment, free_port())
    assert [address for address, _ in found] == [LOOPBACK, LOOPBACK]
    assert found[0][1] == "ConnectionRefusedError"


def served_by_the_agent(rank: Rank) -> list[bool]:
    assert rank.store is not None
    port = rank.store.port  # type: ignore[attr-defined]
    seen = []
    for attempt in ("0", "1"):
        names = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": attempt}
        store = environment_store(rank.rank, rank.world, LOOPBACK, port, 20, environ=names)
        seen.append(store.check([f"stale/{rank.rank}"]))
        store.set(f"stale/{rank.rank}", "x")
        seen.append(store.check([f"stale/{rank.rank}"]))
    return seen


def test_a_restart_under_torchrun_does_not_see_the_keys_of_the_one_before() -> None:
    assert run_ranks(2, served_by_the_agent) == [[False, True, False, True]] * 2


def test_an_address_of_another_host_cannot_be_served() -> None:
    with pytest.raises(CommError, match=r"rank 0 cannot listen on 192\.0\.2\.1:29.*MASTER_ADDR"):
        environment_store(0, 2, "192.0.2.1", 29501, 1, environ={})


def test_nobody_answers() -> None:
    with pytest.raises(CommError, match="rank 1 of 2 could not open the store at 127.0.0.1"):
        open_store(None, free_port(), 1, 2, 1)


def test_a_failing_rank_is_told_with_its_traceback() -> None:
    def fail(rank: Rank) -> None:
        if rank.rank == 1:
            raise KeyError("here")

    with pytest.raises(RankFailed, match=r"rank 1 of 2:[\s\S]*KeyError: 'here'"):
        run_ranks(2, fail)
