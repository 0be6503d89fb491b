"""A damaged checkpoint is found out and passed over; a hostile one runs nothing and reaches nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from shardwise import events
from shardwise.checkpoint.load import latest, load, newest_whole
from shardwise.checkpoint.manifest import DamagedCheckpoint, read
from shardwise.checkpoint.resume import resume
from shardwise.checkpoint.state import collect
from shardwise.checkpoint.store import LocalStore
from shardwise.errors import CheckpointError
from shardwise.spec.plan import Plan
from tests.cpu.checkpoint.world import Net, bits, on_ranks, save_alone, save_on, trained
from tests.examples import examples

Harm = Callable[[Path], Any]


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path, position: int | None = None, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= bit
    path.write_bytes(content)


@pytest.fixture
def two(tmp_path: Path) -> LocalStore:
    """Checkpoints of step 1 and 2 by two ranks."""
    store = LocalStore(tmp_path)
    for step in (1, 2):
        tensors = {"model/w": torch.full((60_000,), float(step)), "model/v": torch.ones(3)}
        save_on(2, store, step=step, tensors=tensors, scalars={"step": step})
    return store


HARMS: dict[str, Harm] = {
    "tensor file cut short": lambda f: cut_short(f / "rank-1.safetensors"),
    "tensor file empty": lambda f: os.truncate(f / "rank-0.safetensors", 0),
    "tensor file altered": lambda f: flip(f / "rank-1.safetensors"),
    "tensor file longer": lambda f: os.truncate(f / "rank-1.safetensors", 1_000_000),
    "tensor file missing": lambda f: (f / "rank-0.safetensors").unlink(),
    "tensor files swapped": lambda f: shutil.copy(f / "rank-0.safetensors", f / "rank-1.safetensors"),
    "a folder for a file": lambda f: ((f / "rank-1.safetensors").unlink(), (f / "rank-1.safetensors").mkdir()),
    "manifest missing": lambda f: (f / "manifest.json").unlink(),
    "manifest cut short": lambda f: cut_short(f / "manifest.json"),
    "manifest empty": lambda f: os.truncate(f / "manifest.json", 0),
    "manifest altered": lambda f: flip(f / "manifest.json"),
    "nothing in it": lambda f: [file.unlink() for file in f.iterdir()],
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_the_older_whole_one_is_used_with_an_event(two: LocalStore, harm: Harm) -> None:
    harm(two.path / "step-00000002")
    seen: list[events.Event] = []
    with events.sink(seen.append):
        manifest = newest_whole(two)
    assert manifest is not None
    assert manifest.step == 1
    (event,) = seen
    assert event["event"] == "checkpoint_damaged"
    assert event["path"] == str(two.path / "step-00000002")
    assert event["path"] in event["why"]


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 2))
@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_is_believed(two: LocalStore, where: float, bit: int, which: int) -> None:
    file = sorted((two.path / "step-00000002").iterdir())[which]
    before = file.read_bytes()
    flip(file, int(where * len(before)), 1 << bit)
    try:
        manifest = newest_whole(two)
        assert manifest is not None
        assert manifest.step == 1
    finally:
        file.write_bytes(before)


def test_none_whole_is_an_error_that_says_so(two: LocalStore) -> None:
    for folder in two.folders():
        cut_short(two.path / folder / "rank-0.safetensors")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* is whole.*start a new run"):
        newest_whole(two)


def test_latest_is_never_one_with_a_file_missing(two: LocalStore) -> None:
    (two.path / "step-00000002" / "rank-1.safetensors").unlink()
    found = latest(two)
    assert found is not None
    assert found.step == 1


def test_all_ranks_go_back_to_the_same_checkpoint_when_one_finds_damage(tmp_path: Path) -> None:
    nets = {}
    for step in (1, 2):
        net, optimizers = trained(steps=step)
        tensors, scalars = collect(net, optimizers)
        nets[step] = bits(collect(net)[0])
        save_on(2, LocalStore(tmp_path), step=step, tensors=tensors, scalars=scalars)
    votes: list[list[bool]] = [[], []]

    class BadSight(LocalStore):
        """A store that shows this rank a damaged file."""

        def digest(self, folder: str, name: str) -> str:
            return "0" * 64 if folder == "step-00000002" else super().digest(folder, name)

    fresh = [Net(seed=5), Net(seed=6)]

    def work(rank: int, barrier: Callable[[], None]) -> Any:
        def agree(whole: bool) -> bool:
            votes[rank].append(whole)
            barrier()
            return all(vote[len(votes[rank]) - 1] for vote in votes)

        store = BadSight(tmp_path) if rank == 1 else LocalStore(tmp_path)
        return resume(store, fresh[rank], plan=Plan(data=2), rank=rank, agree=agree)

    found = on_ranks(2, work)
    assert [one.step for one in found] == [1, 1]
    assert votes == [[True, True], [False, True]]
    assert [bits(collect(net)[0]) for net in fresh] == [nets[1], nets[1]]


def test_damage_is_found_before_anything_is_copied(two: LocalStore) -> None:
    manifest = read(two, "step-00000002")
    flip(two.path / "step-00000002" / "rank-1.safetensors")
    wanted = {"model/w": torch.zeros(60_000), "model/v": torch.zeros(3)}
    with pytest.raises(DamagedCheckpoint, match="was altered"):
        load(two, manifest, wanted, Plan(), 0)
    assert not any(tensor.any() for tensor in wanted.values())


def tamper(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest as a hostile author would, checksums and all."""
    sealed = msgspec.json.decode((folder / "manifest.json").read_bytes())
    manifest = sealed["manifest"]
    change(manifest)
    raw = msgspec.json.encode(manifest)
    sealed = {"sha256": hashlib.sha256(raw).hexdigest(), "manifest": msgspec.Raw(raw)}
    (folder / "manifest.json").write_bytes(msgspec.json.encode(sealed))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("as_torch", [False, True])
def test_a_pickle_in_place_of_tensors_runs_nothing(tmp_path: Path, as_torch: bool) -> None:
    trap = tmp_path / "sprung"
    store = LocalStore(tmp_path / "checkpoints")
    save_alone(store)
    file = store.path / "step-00000001" / "rank-0.safetensors"
    if as_torch:
        torch.save(Trap(trap), file)
    else:
        file.write_bytes(pickle.dumps(Trap(trap)) + b" " * 1000)
    facts = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    tamper(file.parent, lambda m: m["files"].update({"rank-0.safetensors": facts}))
    manifest = newest_whole(store)
    assert manifest is not None
    with pytest.raises(DamagedCheckpoint, match="rank-0.safetensors is not a safetensors file"):
        load(store, manifest, {"model/w": torch.zeros(6)}, Plan(), 0)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists(), "the trap would have worked"


def test_a_pickle_in_place_of_the_manifest_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    store = LocalStore(tmp_path / "checkpoints")
    save_alone(store)
    (store.path / "step-00000001" / "manifest.json").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(CheckpointError, match="none of the 1"):
        newest_whole(store)
    assert not trap.exists()


def move_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"] = {name: manifest["files"]["rank-0.safetensors"]}
        manifest["tensors"]["model/w"]["pieces"][0]["file"] = name

    return change


def set_entry(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["model/w"].update(fields)


def set_piece(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"]["model/w"]["pieces"][0].update(fields)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_file("../step-00000000/rank-0.safetensors"), "not the name of a tensor file"),
        (move_file("/etc/passwd"), "not the name of a tensor file"),
        (move_file("rank-0.safetensors\0"), "not the name of a tensor file"),
        (set_piece(file="rank-9.safetensors"), "not a file of this checkpoint"),
        (set_piece(offset=[1]), "do not cover it exactly once"),
        (set_piece(offset=[-1]), "offset"),
        (set_piece(offset=[0, 0], shape=[6, 1]), "do not cover"),
        (set_entry(shape=[7]), "do not cover"),
        (set_entry(shape=[10**15], pieces=[{"file": "rank-0.safetensors", "offset": [0], "shape": [10**15]}]), "more"),
        (set_entry(dtype="object"), "unknown dtype 'object'"),
        (set_entry(dtype="__class__"), "unknown dtype"),
        (set_entry(surprise=1), "unknown field"),
        (lambda m: m.update(step="1"), "Expected `int`"),
        (lambda m: m.update(step=-1), "step"),
        (lambda m: m["plan"].update(data=-1), "data=-1"),
        (lambda m: m["plan"].update(color="red"), "unknown field"),
        (lambda m: m.update(scalars={"$eval": "1"}), "unknown value"),
        (lambda m: m.update(scalars={"a": {"$dict": [[[], 1]]}}), "unknown value"),
        (lambda m: m.update(scalars={"a": {"$dict": [[{"$tuple": [[]]}, 1]]}}), "unhashable"),
        (lambda m: m.update(scalars={"$tuple": []}), "no dict"),
        (lambda m: m["files"]["rank-0.safetensors"].update(sha256="x"), "sha256"),
    ],
)
def test_a_tampered_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    store = LocalStore(tmp_path)
    save_alone(store)
    tamper(tmp_path / "step-00000001", change)
    with pytest.raises(DamagedCheckpoint, match=message):
        read(store, "step-00000001")


def test_a_manifest_nested_without_end_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save_alone(store)
    raw = b'{"sha256":"","manifest":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    (tmp_path / "step-00000001" / "manifest.json").write_bytes(raw)
    with pytest.raises(DamagedCheckpoint):
        read(store, "step-00000001")


def test_a_file_that_holds_something_else_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    store, other = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    save_alone(store, tensors={"model/w": torch.arange(6.0)})
    for tensors in ({"model/x": torch.arange(6.0)}, {"model/w": torch.arange(6)}, {"model/w": torch.zeros(6, 2)}):
        save_alone(other, tensors=tensors)
        source = sorted(other.path.iterdir())[-1] / "rank-0.safetensors"
        file = store.path / "step-00000001" / "rank-0.safetensors"
        shutil.copy(source, file)
        facts = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        tamper(file.parent, lambda m, facts=facts: m["files"].update({"rank-0.safetensors": facts}))
        with pytest.raises(DamagedCheckpoint, match="model/w"):
            load(store, read(store, "step-00000001"), {"model/w": torch.zeros(6)}, Plan(), 0)


def test_a_link_in_place_of_a_file_is_not_followed(two: LocalStore, tmp_path: Path) -> None:
    file = two.path / "step-00000002" / "rank-0.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    found = newest_whole(two)
    assert found is not None
    assert found.step == 1


def test_a_newer_format_is_refused_and_not_passed_over(two: LocalStore) -> None:
    tamper(two.path / "step-00000002", lambda m: m.update(version=2))
    with pytest.raises(CheckpointError, match="format version 2; this Shardwise reads version 1"):
        newest_whole(two)


@pytest.mark.parametrize("name", ["../a", "a/b", "..", "", "/etc/passwd"])
def test_no_name_leads_out_of_the_store(tmp_path: Path, name: str) -> None:
    store = LocalStore(tmp_path / "store")
    store.create("f")
    with pytest.raises(PermissionError):
        store.write("f", name, [b"x"])
    with pytest.raises(PermissionError):
        store.read(name, "manifest.json")
