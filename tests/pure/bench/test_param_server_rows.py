from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bench.param_server as param_server
from bench.case import Case
from bench.options import Options
from bench.paced import HELD_OUT, WINDOWS, Kept, Pace, kept, write_held_out
from bench.param_server import ALONE, ASYNC, BASE, PACE, SLOW, STALE, SYNC
from bench.peers import Peer
from bench.rounds import Lost

FAKE = Path(__file__).with_name("fake_subject.py")
CASE = Case(precision="float32", batch=2, context=8, vocab=32)
Rows = dict[tuple[str, str], dict[str, Any]]


def peer(behaviour: str) -> Peer:
    return Peer("sys", "pip install sys", lambda case: [sys.executable, str(FAKE), str(case.ranks), behaviour])


def by_system(rows: list[dict[str, Any]]) -> Rows:
    return {(row["system"], row["metric"]): row for row in rows}


def test_equal_workers_give_times_a_ratio_with_its_target_and_losses() -> None:
    peers = {BASE: peer("even"), SYNC: peer("even"), STALE: peer("even:0.5")}
    rows = by_system(param_server.equal(CASE, list(peers), Options(rounds=2), peers))
    metrics = {(name, metric) for name in peers for metric in ("step_time", "loss")}
    assert set(rows) == metrics | {(name, "ratio_to_all_reduce") for name in (SYNC, STALE)}
    assert rows[SYNC, "ratio_to_all_reduce"]["target"] == "<= 1.111"
    assert rows[STALE, "ratio_to_all_reduce"]["target"] is None
    assert len(rows[SYNC, "ratio_to_all_reduce"]["values"]) == 2
    assert rows[SYNC, "step_time"]["agrees"] is True
    assert rows[SYNC, "step_time"]["compared_steps"] > 4
    assert "agrees" not in rows[STALE, "step_time"], "older parameters give other losses"
    assert rows[STALE, "loss"]["median"] == pytest.approx(rows[SYNC, "loss"]["median"] + 0.5)


def test_a_server_in_step_whose_losses_differ_is_said_to() -> None:
    peers = {BASE: peer("even"), SYNC: peer("even:0.5")}
    rows = by_system(param_server.equal(CASE, list(peers), Options(rounds=1), peers))
    assert rows[SYNC, "step_time"]["agrees"] is False
    assert rows[SYNC, "step_time"]["note"] == "losses differ"


def test_ddp_that_is_not_installed_is_a_row() -> None:
    peers = {BASE: peer("even"), "ddp": Peer("no_such_package", "pip install it", lambda case: [])}
    rows = by_system(param_server.equal(CASE, list(peers), Options(rounds=1), peers))
    assert rows["ddp", "step_time"]["missing"] == "pip install it"
    assert ("ddp", "ratio_to_all_reduce") not in rows


def slowed(found: dict[str, Any], rounds: int = 2) -> tuple[Rows, dict[str, list[int]]]:
    seeds: dict[str, list[int]] = {name: [] for name in found}

    def train(name: str, *, seed: int) -> Kept:
        seeds[name].append(seed)
        if found[name] is None:
            raise Lost("died; out of luck")
        return Kept((found[name] * seed, found[name] * seed, 1.0), 10.0, 2.0 + seed)

    return by_system(param_server.slowed(list(found), Options(rounds=rounds), train)), seeds


def test_what_is_left_of_the_fast_workers_rate_is_taken_seed_by_seed() -> None:
    rows, seeds = slowed({ALONE: 100.0, BASE: 25.0, STALE: 90.0})
    assert seeds == {ALONE: [1, 2], BASE: [1, 2], STALE: [1, 2]}
    assert rows[STALE, "fast_worker"]["values"] == [90.0, 180.0]
    assert rows[STALE, "ratio_to_alone"]["values"] == pytest.approx([0.9, 0.9])
    assert rows[STALE, "ratio_to_alone"]["target"] == ">= 0.8"
    assert rows[BASE, "ratio_to_alone"]["median"] == pytest.approx(0.25)
    assert rows[BASE, "ratio_to_alone"]["target"] is None
    assert (ALONE, "ratio_to_alone") not in rows
    assert rows[STALE, "held_out_loss"]["values"] == [3.0, 4.0]
    assert "counted in samples" in rows[ALONE, "fast_worker"]["note"]


def test_a_run_that_is_lost_counts_as_a_rate_of_nothing() -> None:
    rows, _ = slowed({ALONE: 100.0, ASYNC: None})
    assert rows[ASYNC, "fast_worker"]["values"] == [0.0, 0.0]
    assert rows[ASYNC, "fast_worker"]["note"] == "round 1: died; out of luck"
    assert rows[ASYNC, "ratio_to_alone"]["median"] == 0.0
    assert (ASYNC, "held_out_loss") not in rows


def test_a_rate_counts_the_settled_steps_and_not_the_one_that_evaluates() -> None:
    pace = Pace(sample_s=1.0, times=4, steps=4, settled=2)
    answers = [{"seconds": [0.0, 9.0, 2.0, 2.0, 99.0]}, {"seconds": [0.0, 9.0, 3.0, 5.0, 99.0]}]
    told = [{"samples": [5, 5, 8, 6, 5], "loss": 1.5}, {"samples": [5, 5, 2, 2, 5], "loss": 1.5}]
    found = kept(pace, answers, told)
    assert found == Kept((3.5, 0.5), 2 / 8, 1.5)
    assert found.fast == 3.5


def test_the_last_worker_sleeps_longer_for_its_samples() -> None:
    pace = Pace(sample_s=0.5, times=4, steps=1, settled=0)
    assert [pace.seconds(2, rank, ranks=3) for rank in range(3)] == [1.0, 1.0, 4.0]
    assert pace.seconds(0, rank=2, ranks=3) == 0.0


def test_a_pace_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PACE.environment().items():
        monkeypatch.setenv(name, value)
    assert Pace.from_environment() == PACE


def test_the_cases_asked_for_are_run_with_their_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(param_server, "equal", lambda case, names, options: asked.append((str(case), names)) or [])
    monkeypatch.setattr(param_server, "slowed", lambda names, options, train: asked.append((SLOW, names)) or [])
    param_server.run(Options())
    assert asked == [
        ("float32 batch=2", [BASE, SYNC, STALE, ASYNC, "ddp"]),
        ("float32 batch=8", [BASE, SYNC, STALE, ASYNC, "ddp"]),
        (SLOW, [BASE, SYNC, STALE, ASYNC, ALONE]),
    ]
    asked.clear()
    param_server.run(Options(quick=True))
    assert asked == [("float32 batch=2", [BASE, SYNC]), (SLOW, [STALE, ALONE])]
    asked.clear()
    param_server.run(Options(cases=("slowed",), only=(STALE, "ddp")))
    assert asked == [(SLOW, [STALE])]


def test_held_out_windows_are_others_than_those_to_train_on(tmp_path: Path) -> None:
    case = Case(precision="float32", batch=3, context=8, vocab=32, folder=str(tmp_path))
    case.write_tokens(steps=50)
    write_held_out(case)
    held_out, ordered = np.load(tmp_path / HELD_OUT), np.load(tmp_path / "ordered.npy")
    assert held_out.shape == (WINDOWS, 9)
    assert not {tuple(each) for each in held_out.tolist()} & {tuple(each) for each in ordered.tolist()}
    learnable = [((rows[:, :-1].astype(int) * 7 + 3) % 32 == rows[:, 1:]).mean() for rows in (held_out, ordered)]
    assert learnable[0] == pytest.approx(learnable[1], abs=0.05), "by the same law"
    assert learnable[0] > 0.15
