"""`shardwise cluster calibrate` from end to end, and what a run records of its links."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise import events
from shardwise.cli.main import run as command
from shardwise.cluster.discover import discover
from shardwise.comm import calibrate as comm_calibrate
from shardwise.errors import NoPlanFits, SpecError
from shardwise.observe.summary import read
from shardwise.observe.text import summary_text
from shardwise.plan.cost import bucket_bytes
from shardwise.spec import files
from shardwise.spec.cluster import Cluster, Device
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile
from shardwise.train import context, start
from shardwise.train.calibrate import Calibrated, calibrate
from tests.cpu.train.conftest import Shared

Train = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def here(zygote: Any, trained: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Calibrations start from the tests' zygote and are kept in a folder of the test, as `trained` finds them."""
    monkeypatch.setattr(start, "take", lambda: Shared(zygote))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SHARDWISE_TRANSPORT", raising=False)
    return tmp_path


def assert_measured(found: Cluster, ranks: int) -> None:
    (calibration,) = found.calibrations
    assert calibration.ranks == ranks
    links = {(pair.source, pair.target): pair.link for pair in calibration.pairs}
    assert set(links) == {(a, b) for a in range(ranks) for b in range(ranks) if a != b}
    for (a, b), link in links.items():
        assert 0 < link.latency_s < 0.1
        assert link.bandwidth > 1e6
        assert link.latency_s < 50 * links[b, a].latency_s, "a round trip is one, whoever begins it"
        assert link.bandwidth < 50 * links[b, a].bandwidth
    assert all(seconds > 0 for rows in calibration.collectives.values() for _, seconds in rows)


@pytest.mark.slow
def test_what_is_measured_is_saved_and_found_again_by_plans_and_runs(here: Path, trained: Train) -> None:
    found = calibrate(ranks=2, out=here / "two.json")
    assert isinstance(found, Calibrated)
    assert_measured(found.cluster, 2)
    assert found.seconds < 60
    assert found.written == (here / "cache" / "shardwise" / "links.json", here / "two.json")
    assert files.load(here / "two.json", Cluster) == found.cluster
    again = discover(probe=False)
    assert again.calibrations == found.cluster.calibrations
    assert again.link == found.cluster.link
    run = trained(plan="data=2", steps=4)
    plan = files.load(run.path / "plan.json", Plan)
    assert files.load(run.path / "cluster.json", Cluster).calibrations == found.cluster.calibrations
    profile = files.load(run.path / "profile.json", ModelProfile)
    assert plan.sync.bucket_bytes == bucket_bytes(profile.parameter_bytes, again, 2) > 0
    by_file = trained(plan="data=2", steps=4, cluster=here / "two.json")
    assert files.load(by_file.path / "plan.json", Plan).sync == plan.sync


@pytest.mark.slow
def test_the_command_draws_what_it_measured(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", "gloo")
    assert command(["cluster", "calibrate", "--ranks", "3", "--out", str(here / "three.json")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("measured    3 ranks on 1 host over gloo, in ")
    assert all(f"\nrank {rank}  " in text for rank in range(3))
    assert all(f"\n{operation} " in text for operation in comm_calibrate.OPERATIONS)
    assert f"saved       {here / 'three.json'}\n" in text
    assert_measured(files.load(here / "three.json", Cluster), 3)


def test_one_rank_and_an_unknown_place_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="--ranks 1: two ranks at least"):
        calibrate(ranks=1)
    with pytest.raises(SpecError, match="--on mars"):
        calibrate(on="mars")  # type: ignore[arg-type]
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(context, "_current", None)
    with pytest.raises(SpecError, match=r"1 rank\(s\) were started.*torchrun"):
        calibrate(on="env")


@pytest.mark.slow
def test_ranks_of_another_launcher_measure_each_other(here: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "shardwise", "cluster", "calibrate", "--on", "env", "--out", str(here / "env.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured    2 ranks on 1 host") == 1, "one rank speaks"
    assert_measured(files.load(here / "env.json", Cluster), 2)


def test_a_cluster_file_larger_than_this_machine_does_not_start_ranks_here(here: Path, trained: Train) -> None:
    device = Device(kind="cpu", memory_bytes=10**11)
    machine = discover(probe=False)
    wide = Cluster(nodes=(type(machine.nodes[0])(devices=(device,) * 16, link=machine.nodes[0].link, cores=16),))
    files.save(wide, here / "wide.json")
    with pytest.raises(NoPlanFits, match="16 ranks, but this cluster has places for"):
        trained(cluster=here / "wide.json")


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_run_records_what_its_axes_used_and_exchanged(
    trained: Train, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", transport)
    run = trained(plan="data=2", steps=6)
    found = read(run.path)
    assert [(axis.name, axis.ranks, axis.backend) for axis in found.axes] == [("data", 2, transport)]
    told = [event for event in events.read(run.path / "events.jsonl") if event["event"] == "wire"]
    assert sorted(event["rank"] for event in told) == [0, 1]
    reduced = next(row for row in found.exchanged if row.operation == "all_reduce")
    weights = 4 * (6 * 16 + 16 + 16 * 3 + 3)
    assert reduced.messages >= 2 * 6, "a bucket a step on each of two ranks"
    assert reduced.num_bytes >= 2 * 6 * weights
    sent = sum(row.sent_bytes for row in found.exchanged)
    if transport == "shm":
        assert (sent, found.counted_bytes) == (0, {"data": 0})
    else:
        assert 0.9 * sent < found.counted_bytes["data"] < 3 * sent + 100_000, "gloo's own words are many here"
    text = summary_text(found)
    assert f"mesh        data: 2 ranks over {transport}\n" in text
    assert found.exposed is not None
    assert 0 < found.exposed.share < 1
    assert found.exposed.predicted_s is not None
    assert "a step waiting for other ranks" in text
