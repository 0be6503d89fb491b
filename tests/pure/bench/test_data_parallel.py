from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench.data_parallel as data_parallel
from bench.case import Case, order, pseudo_text
from bench.options import Options
from bench.peers import PEERS, Peer

FAKE = Path(__file__).with_name("fake_subject.py")
CASE = Case(precision="float32", batch=2, context=8, vocab=32)


def peer(behaviour: str, package: str = "sys", *, alone: bool = False) -> Peer:
    def command(case: Case) -> list[str]:
        return [sys.executable, str(FAKE), str(case.ranks), behaviour]

    return Peer(package, f"pip install {package}", command, alone=alone)


def played(names: Sequence[str], peers: dict[str, Peer], rounds: int = 3) -> dict[tuple[str, str], dict[str, Any]]:
    rows = data_parallel.run_case(CASE, names, Options(rounds=rounds), peers)
    return {(row["system"], row["metric"]): row for row in rows}


def test_a_case_gives_times_ratios_and_compared_losses() -> None:
    peers = {"shardwise": peer("even"), "ddp": peer("even")}
    rows = played(["shardwise", "ddp"], peers)
    assert set(rows) == {("shardwise", "step_time"), ("ddp", "step_time"), ("shardwise", "ratio_to_ddp")}
    ours = rows["shardwise", "step_time"]
    assert ours["case"] == "float32 batch=2"
    assert len(ours["values"]) == 3
    assert all(0.001 <= value < 1 for value in ours["values"])
    assert ours["agrees"] is True
    assert ours["max_loss_difference"] == 0.0
    steps = data_parallel.WARM_UP + 3 * (1 + data_parallel.steps_a_turn(CASE))
    assert ours["compared_steps"] == ours["checksum"] == steps
    assert ours["first_loss"] == 10.5  # 10 on rank 0 and 11 on rank 1
    assert len(rows["shardwise", "ratio_to_ddp"]["values"]) == 3


def test_ours_is_held_to_ddp_and_to_a_bare_barrier() -> None:
    names = ["shardwise", "shardwise:exact", "ddp", "unsynchronised", "barrier"]
    peers = {name: peer("even") for name in names[:3]} | {name: peer("even", alone=True) for name in names[3:]}
    rows = played(names, peers, rounds=2)
    ratios = {key: row["target"] for key, row in rows.items() if key[1].startswith("ratio_to_")}
    assert ratios == {
        ("shardwise", "ratio_to_ddp"): "<= 1.0 x ddp",
        ("shardwise:exact", "ratio_to_ddp"): None,
        ("unsynchronised", "ratio_to_ddp"): None,
        ("barrier", "ratio_to_ddp"): None,
        ("shardwise:exact", "ratio_to_shardwise"): "<= 1.1 x shardwise",
        ("shardwise", "ratio_to_barrier"): "<= 1.02 x barrier",
    }
    assert rows["shardwise", "step_time"]["target"] == "<= 1.0 x ddp, <= 1.02 x barrier"
    assert rows["barrier", "step_time"]["target"] is None
    both = zip(rows["shardwise", "step_time"]["values"], rows["barrier", "step_time"]["values"], strict=True)
    assert rows["shardwise", "ratio_to_barrier"]["values"] == [ours / theirs for ours, theirs in both]


def test_ranks_that_train_alone_have_losses_of_their_own_and_nobody_is_compared_with_them() -> None:
    peers = {"unsynchronised": peer("even:2", alone=True), "shardwise": peer("even"), "lightning": peer("even:3")}
    rows = played(list(peers), peers, rounds=1)
    assert {"agrees", "compared_with", "note"}.isdisjoint(rows["unsynchronised", "step_time"])
    assert rows["shardwise", "step_time"]["compared_with"] == "shardwise"
    assert rows["lightning", "step_time"]["compared_with"] == "shardwise"
    assert rows["lightning", "step_time"]["note"] == "losses differ"


def test_the_rows_without_synchronisation_are_launched_as_ddp_is() -> None:
    ddp, alone, barrier = (PEERS[name] for name in ("ddp", "unsynchronised", "barrier"))
    assert ddp.command(CASE)[:-1] == alone.command(CASE)[:-1]
    assert barrier.command(CASE) == [*alone.command(CASE), "--barrier"]
    assert [name for name, each in PEERS.items() if each.alone] == ["unsynchronised", "barrier"]


def test_a_peer_that_is_not_installed_is_a_row_and_starts_nothing() -> None:
    rows = played(["ddp", "deepspeed"], {"ddp": peer("even"), "deepspeed": peer("even", "no_such_package")}, rounds=1)
    assert rows["deepspeed", "step_time"]["missing"] == "pip install no_such_package"
    assert ("deepspeed", "ratio_to_ddp") not in rows


def test_a_hang_is_infinite_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "STEP_S", 0.1)
    first_round = data_parallel.WARM_UP + 1 + data_parallel.steps_a_turn(CASE)
    peers = {"ddp": peer("even"), "lightning": peer(f"hang:{first_round + 1}")}
    rows = played(["ddp", "lightning"], peers)
    hung = rows["lightning", "step_time"]
    assert [math.isfinite(value) for value in hung["values"]] == [True, False, False]
    assert hung["median"] == math.inf
    assert "round 2: hung: no answer within" in hung["note"]
    assert all(math.isfinite(value) for value in rows["ddp", "step_time"]["values"])
    assert rows["lightning", "ratio_to_ddp"]["median"] == math.inf


def test_a_peer_that_dies_before_the_first_round_is_infinite_with_its_words() -> None:
    rows = played(["ddp", "accelerate"], {"ddp": peer("even"), "accelerate": peer("die:2")}, rounds=2)
    died = rows["accelerate", "step_time"]
    assert died["values"] == [math.inf, math.inf]
    assert "before the first round: died; " in died["note"]
    assert "out of luck" in died["note"]


def test_losses_that_differ_are_said_to() -> None:
    same = data_parallel.agreement([3.0, 2.0, 1.0], [3.0, 2.00005, 1.0], "float32")
    assert same["agrees"] is True
    differ = data_parallel.agreement([3.0, 2.0, 1.0], [3.0, 2.0002, 1.0], "float32")
    assert differ["agrees"] is False
    assert differ["max_loss_difference"] == pytest.approx(2e-4)
    assert data_parallel.agreement([3.0, math.nan], [3.0, 2.0], "float32")["agrees"] is False
    assert data_parallel.agreement([], [1.0], "float32")["agrees"] is False


def test_peers_read_the_samples_in_the_order_in_which_shardwise_does(tmp_path: Path) -> None:
    case = Case(precision="float32", batch=3, context=8, vocab=32, folder=str(tmp_path))
    case.write_tokens(steps=5)
    flat = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16)
    ordered = np.load(tmp_path / "ordered.npy")
    assert len(flat) == 30 * 8 + 1
    assert ordered.shape == (30, 9)
    for position, sample in enumerate(order(30, case.seed)):
        assert ordered[position].tolist() == flat[sample * 8 : sample * 8 + 9].tolist()
    assert sorted(order(30, case.seed).tolist()) == list(range(30))


def test_the_tokens_are_the_same_every_time_and_fit_the_vocabulary() -> None:
    one, two = pseudo_text(5000, 64, 3), pseudo_text(5000, 64, 3)
    assert one.tolist() == two.tolist()
    assert one.max() < 64
    follows = (one[1:] == (one[:-1].astype(int) * 7 + 3) % 64).mean()
    assert 0.2 < follows < 0.9


def test_a_case_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CASE.environment().items():
        monkeypatch.setenv(name, value)
    assert Case.from_environment() == CASE


def test_only_takes_known_systems() -> None:
    assert Options(only=("ddp",)).chosen(["shardwise", "ddp"], ["shardwise"]) == ["ddp"]
    assert Options(quick=True).chosen(["shardwise", "ddp", "x"], ["x", "ddp"]) == ["ddp", "x"]
    with pytest.raises(SystemExit, match="--only horovod: there is no such system here; known: shardwise, ddp"):
        Options(only=("horovod",)).chosen(["shardwise", "ddp"], [])
