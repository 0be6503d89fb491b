"""A save that fails or is killed leaves every earlier checkpoint whole, and nothing that looks like a new one."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.checkpoint.load import best, latest, load, newest_whole
from shardwise.checkpoint.manifest import committed
from shardwise.checkpoint.save import Saved, save
from shardwise.checkpoint.store import LocalStore, MemoryStore
from shardwise.errors import CheckpointError
from shardwise.spec.plan import Plan
from tests.cpu.checkpoint.world import on_ranks, save_alone, save_on


def state(step: int) -> dict[str, torch.Tensor]:
    return {"model/w": torch.full((50_000,), float(step)), "model/v": torch.full((3,), float(step))}


def check_whole(store: LocalStore | MemoryStore) -> int:
    """The newest whole checkpoint holds just its own step's values; returns the step, 0 for none."""
    manifest = newest_whole(store)
    if manifest is None:
        return 0
    wanted = {name: torch.empty_like(tensor) for name, tensor in state(0).items()}
    load(store, manifest, wanted, Plan(), 0)
    assert all((tensor == manifest.step).all() for tensor in wanted.values())
    return manifest.step


def test_a_full_medium_is_an_error_on_every_rank_and_training_may_go_on() -> None:
    store = MemoryStore(capacity_bytes=500_000)
    assert all(isinstance(one, Saved) for one in save_on(2, store, step=1, tensors=state(1)))
    before = {name: dict(files) for name, files in store.content.items()}
    store.capacity_bytes = 300_000
    failed = save_on(2, store, step=2, tensors=state(2))
    assert [type(one) for one in failed] == [CheckpointError] * 2
    assert any("No space left on device" in str(one) for one in failed)
    assert "No space left on device" in str(failed[0])
    assert "step 2" in str(failed[1])
    assert store.content == before
    store.capacity_bytes = None
    assert all(isinstance(one, Saved) for one in save_on(2, store, step=3, tensors=state(3)))
    assert check_whole(store) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    save_alone(store, step=1, tensors=state(1))
    large = {"model/w": torch.zeros(1_000_000)}
    for world in (1, 2):
        failed = save_on(world, store, step=2, tensors=large)
        assert [type(one) for one in failed] == [CheckpointError] * world
        assert "No space left on device" in str(failed[0])
    assert store.folders() == ["step-00000001"]
    assert check_whole(store) == 1
    save_alone(store, step=3, tensors=state(3))
    assert check_whole(store) == 3


def test_an_unwritable_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    failed = save_on(2, LocalStore(tmp_path / "file" / "checkpoints"), step=1)
    assert [type(one) for one in failed] == [CheckpointError] * 2
    assert str(tmp_path / "file" / "checkpoints") in str(failed[0])
    assert "Not a directory" in str(failed[0])
    assert "choose another place" in str(failed[0])
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        failed = save_on(1, LocalStore(tmp_path / "locked"), step=1)
        assert "Permission denied" in str(failed[0])


class FailingStore(LocalStore):
    """Fails to write the files of one rank."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path)
        self.rank = rank

    def write(self, folder: str, name: str, chunks: Any, *, durable: bool = True) -> None:
        if name.startswith(f"rank-{self.rank}.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().write(folder, name, chunks, durable=durable)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_ranks_failure_is_everyones_and_rank_0_has_the_reason(tmp_path: Path, rank: int) -> None:
    save_on(3, LocalStore(tmp_path), step=1, tensors=state(1))
    failed = save_on(3, FailingStore(tmp_path, rank), step=2, tensors=state(2))
    assert [type(one) for one in failed] == [CheckpointError] * 3
    assert "Input/output error" in str(failed[0])
    assert "Input/output error" in str(failed[rank])
    assert rank == 0 or f"rank {rank}" in str(failed[0])
    assert LocalStore(tmp_path).folders() == ["step-00000001"]


def test_ranks_with_different_models_are_found_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def save_mine(rank: int, barrier: Any) -> Any:
        tensors = {"model/w": torch.zeros(4 + rank)}
        return save(store, step=1, tensors=tensors, scalars={}, plan=Plan(data=2), rank=rank, world=2, barrier=barrier)

    failed = on_ranks(2, save_mine)
    assert [type(one) for one in failed] == [CheckpointError] * 2
    assert "All ranks must build the same model" in str(failed[0])
    assert store.folders() == []


def test_what_cannot_be_saved_is_named() -> None:
    def message(**settings: Any) -> str:
        (failed,) = save_on(1, MemoryStore(), **settings)
        assert isinstance(failed, CheckpointError)
        return str(failed)

    assert "'model/z' cannot be saved" in message(tensors={"model/z": torch.zeros(2, dtype=torch.complex128)})
    assert "torch.sparse_coo" in message(tensors={"model/z": torch.zeros(2, 2).to_sparse()})
    assert "device 'meta'" in message(tensors={"model/z": torch.zeros(2, device="meta")})
    assert "scalars.a.b[1] is a object" in message(scalars={"a": {"b": [1, object()]}})
    assert "scalars.t is a Tensor" in message(scalars={"t": torch.zeros(1)})


def test_a_peer_that_is_gone_passes_through_and_the_place_is_cleared(tmp_path: Path) -> None:
    calls = []

    def barrier() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionResetError("rank 1 is gone")

    store = LocalStore(tmp_path)
    plan = Plan(data=2)
    with pytest.raises(ConnectionResetError):
        save(store, step=1, tensors=state(1), scalars={}, plan=plan, rank=0, world=2, barrier=barrier)
    assert store.folders() == []


class Crash(BaseException):
    """The process is gone."""


class CrashingStore(LocalStore):
    """Dies before its operation number `at`, or in the middle of it where it has one; nothing works afterwards."""

    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path)
        self.left = at
        self.dead = False

    def _tick(self) -> None:
        if self.dead or self.left == 0:
            self.dead = True
            raise Crash
        self.left -= 1

    def create(self, folder: str) -> None:
        self._tick()
        super().create(folder)

    def write(self, folder: str, name: str, chunks: Any, *, durable: bool = True) -> None:
        def ticking() -> Iterator[Any]:
            for chunk in chunks:
                self._tick()
                yield chunk[: len(chunk) // 2]
                self._tick()
                yield chunk[len(chunk) // 2 :]

        self._tick()
        super().write(folder, name, ticking(), durable=durable)

    def publish(self, folder: str, final: str) -> None:
        self._tick()
        super().publish(folder, final)
        self._tick()

    def discard(self, folder: str, name: str) -> None:
        self._tick()
        super().discard(folder, name)

    def remove(self, folder: str) -> None:
        self._tick()
        if not folder.startswith("."):
            os.rename(self.path / folder, self.path / f".removing-{folder}")
            self._tick()
            folder = f".removing-{folder}"
        for file in list((self.path / folder).iterdir()):
            file.unlink()
            self._tick()
        super().remove(folder)


def test_a_crash_before_any_operation_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    finished = False
    at = 0
    while not finished:
        place = tmp_path / str(at)
        for step in (1, 2):
            save_alone(LocalStore(place), step=step, tensors=state(step))
        store = CrashingStore(place, at)
        (result,) = save_on(1, store, step=3, tensors=state(3))
        finished = isinstance(result, Saved)
        assert finished or isinstance(result, Crash)
        after = LocalStore(place)
        step = check_whole(after)
        assert step in (2, 3)
        found = latest(after)
        assert found is not None
        assert found.step == step
        save_alone(after, step=4, tensors=state(4))
        assert check_whole(after) == 4
        assert not [name for name in after.folders() if name.startswith(".")]
        shutil.rmtree(place)
        at += 1
    assert at > 15


def test_a_process_killed_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    dice = random.Random(0)
    last = 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                while True:
                    last += 1
                    one = {"step": last, "tensors": state(last), "scalars": {}, "plan": Plan()}
                    save(store, **one, rank=0, world=1, barrier=lambda: None)
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        step = check_whole(store)
        assert step >= last
        last = step
        assert len(committed(store)) <= 3  # the two that are kept, and one that was about to be deleted
    assert last > 3


def test_the_last_k_and_the_best_are_kept() -> None:
    store = MemoryStore()
    for step in range(1, 8):
        save_on(2, store, step=step, keep_last=2, best=step in (2, 4))
    assert store.folders() == ["step-00000004", "step-00000006", "step-00000007"]
    found = best(store)
    assert found is not None
    assert found.step == 4
    save_on(2, store, step=8, keep_last=2, best=True)
    assert store.folders() == ["step-00000007", "step-00000008"]
    save_on(2, store, step=9, keep_last=0)
    assert store.folders() == ["step-00000008", "step-00000009"]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2):
        save_alone(store, step=step, keep_last=2)
    (tmp_path / "step-00000002" / "rank-0.safetensors").unlink()
    save_alone(store, step=3, keep_last=2)
    assert store.folders() == ["step-00000001", "step-00000002", "step-00000003"]
    save_alone(store, step=4, keep_last=2)
    assert store.folders() == ["step-00000003", "step-00000004"]


def test_a_step_that_is_saved_again_replaces_the_older_attempt(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2, 3):
        save_alone(store, step=step, tensors=state(step), keep_last=3)
    (tmp_path / "step-00000003" / "rank-0.safetensors").write_bytes(b"")
    save_alone(store, step=2, tensors=state(2), keep_last=3)
    assert store.folders() == ["step-00000001", "step-00000002-1", "step-00000003"]
    assert check_whole(store) == 2
    save_alone(store, step=3, tensors=state(3), keep_last=3)
    assert store.folders() == ["step-00000001", "step-00000002-1", "step-00000003-1"]
    assert check_whole(store) == 3
