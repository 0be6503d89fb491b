"""Forking a process that has imported torch; what its ranks listen on; the probe."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shardwise.cluster.discover import discover, usable_cores
from shardwise.cluster.local import PRELOAD, Zygote
from shardwise.cluster.process import Starter
from shardwise.cluster.ranks import run_ranks
from tests.cpu.cluster.entries import WAIT_S

HERE = "tests.cpu.cluster.torch_entries"
LISTEN = "0A"


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    found = Zygote.start((*PRELOAD, HERE))
    yield found
    found.close()


def listeners(pid: int) -> set[str]:
    """Addresses on which a process listens, from the kernel's tables."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # the descriptor that listed them
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and words[9] in inodes:
                found.add(address(words[1].partition(":")[0], family))
    return found


def address(text: str, family: int) -> str:
    """The kernel prints addresses as words in the host's byte order."""
    raw = bytes.fromhex(text)
    count = len(raw) // 4
    return socket.inet_ntop(family, struct.pack(f"={count}I", *struct.unpack(f">{count}I", raw)))


def test_the_oracle_sees_a_public_listener() -> None:
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("::1", 0), family=socket.AF_INET6):
        assert {"0.0.0.0", "::1"} <= listeners(os.getpid())


@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_rank_computes_with_the_threads_it_was_given(starter: Starter, tmp_path: Path, count: int) -> None:
    process = starter.fork(f"{HERE}:threads", {"folder": str(tmp_path)}, env={}, threads=count, stdout=None)
    assert starter.wait_for(process.pid, WAIT_S) == 0
    assert json.loads((tmp_path / "threads").read_text()) == [count, 256.0**3]


def test_ranks_meet_and_listen_on_loopback_only(starter: Starter, tmp_path: Path) -> None:
    seen: dict[int, set[str]] = {}

    def look() -> None:
        met = list(tmp_path.glob("met-*"))
        if len(met) == 2 and not seen:
            seen.update({int(path.name[4:]): listeners(int(path.name[4:])) for path in met})
            (tmp_path / "seen").touch()

    exits = run_ranks(
        starter, f"{HERE}:meet", lambda rank: {"folder": str(tmp_path)}, 2, logs=tmp_path / "logs", on_poll=look
    )
    logs = [Path(end.log).read_text() for end in exits]
    assert [end.status for end in exits] == [0, 0], logs
    assert [path.read_text() for path in tmp_path.glob("met-*")] == ["3.0", "3.0"]
    assert len(seen) == 2
    assert set().union(*seen.values()) == {"127.0.0.1"}, logs


def test_the_probe_measures_within_its_time(starter: Starter, tmp_path: Path) -> None:
    began = time.monotonic()
    found = discover(cache=tmp_path / "cluster.json", starter=starter)
    spent = time.monotonic() - began
    assert spent < 10.0  # two seconds on a machine of its own
    assert len(found.nodes[0].devices) >= 1
    if found.devices[0].kind == "cpu":
        assert found.nodes[0].cores == usable_cores()
        for device in found.devices:
            assert device.measured
            assert 1e8 < device.peak_flops["float32"] < 1e13
            assert device.peak_flops["bfloat16"] > 1e7
            assert 1e8 < device.memory_bandwidth < 1e12


def test_the_probe_in_a_process_of_its_own(tmp_path: Path) -> None:
    cache = tmp_path / "cluster.json"
    found = discover(cache=cache)
    assert found.devices[0].measured
    assert discover(cache=cache, probe=False) == found
