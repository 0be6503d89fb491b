"""Strict files: what is saved is loaded; an unknown key is an error with a suggestion; a write is whole or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.errors import SpecError
from shardwise.spec import files
from shardwise.spec.cluster import Cluster, Device, Link, Node
from shardwise.spec.plan import Plan
from shardwise.spec.sync import Sync

CLUSTER = Cluster(
    nodes=(
        Node(
            devices=(Device(kind="cpu", memory_bytes=10**9, peak_flops={"float32": 7e10}),) * 2,
            link=Link(latency_s=1e-4, bandwidth=1e9),
            cores=2,
        ),
    )
)


@pytest.mark.parametrize("value", [CLUSTER, Plan(data=2, sync=Sync(word="local", every=5))], ids=["cluster", "plan"])
def test_a_noun_survives_its_file(value: object, tmp_path: Path) -> None:
    files.save(value, tmp_path / "noun.json")
    assert files.load(tmp_path / "noun.json", type(value)) == value


def test_toml_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('data = 2\n[sync]\nword = "all_reduce"\nbucket_bytes = 1000\n')
    assert files.load(tmp_path / "plan.toml", Plan) == Plan(data=2, sync=Sync(bucket_bytes=1000))


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ('{"tensr": 2}', Plan, "unknown key 'tensr' of {file}; did you mean 'tensor'?"),
        ('{"sync": {"evry": 2}}', Plan, "unknown key 'evry' in [sync] of {file}; did you mean 'every'?"),
        (
            '{"nodes": [{"devices": [{"kind": "a", "memory": 1}], "link": {"latency_s": 0, "bandwidth": 1}}]}',
            Cluster,
            "did you mean 'memory_bytes'?",
        ),
        ('{"nodes": []}', Cluster, "no device"),
        ('{"data": "two"}', Plan, "`$.data`"),
        ("{", Plan, "not valid JSON"),
        ('{"nodes": [{"devices": [], "link": {"latency_s": 0, "bandwidth": -1}}]}', Cluster, "cannot be negative"),
    ],
)
def test_a_bad_file_says_what_is_wrong(text: str, kind: type, says: str, tmp_path: Path) -> None:
    file = tmp_path / "noun.json"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        files.load(file, kind)
    assert says.format(file=file) in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read"):
        files.load(tmp_path / "none.toml", Plan)


def test_a_failed_write_leaves_the_old_file_and_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_whole(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
