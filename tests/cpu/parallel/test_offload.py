"""What is offloaded to disk: the same bits as in memory, little of it in memory, and clear errors of a failing disk."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_low_bit import gpt, train
from torch import nn

from shardwise.errors import RunError, SpecError
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.spill import ALIGN, Spill
from shardwise.parallel.updates import PiecewiseUpdates
from shardwise.spec.plan import Offload, Plan
from tests.ranks import Rank, run_ranks

DISK = Offload(optimizer="disk")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def started(plan: Plan, folder: Path | None = None, kind: Any = torch.optim.AdamW) -> tuple[Replica, Any]:
    module = gpt()
    replica = parallelize(module, plan, Rank(0, 1, None).mesh(plan), scratch=folder)
    return replica, kind(module.parameters(), lr=3e-3)


def open_files(folder: Path) -> int:
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += str(folder) in os.readlink(link)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (Plan(), torch.optim.AdamW),
        (Plan(precision="float64"), torch.optim.AdamW),
        (Plan(), partial(torch.optim.AdamW, fused=True)),
        (Plan(), torch.optim.Adafactor),
        (Plan(precision="bfloat16", parameters="bfloat16"), torch.optim.AdamW),
        (Plan(precision="bfloat16", parameters="bfloat16", states="int8"), torch.optim.AdamW),
    ],
    ids=["float32", "float64", "fused", "adafactor", "masters", "int8"],
)
def test_states_on_disk_are_the_same_bits(tmp_path: Path, plan: Plan, kind: Any) -> None:
    fields = {name: getattr(plan, name) for name in ("precision", "parameters", "states")}
    here, there = started(plan, kind=kind), started(Plan(offload=DISK, **fields), tmp_path, kind)
    assert train(*here, 6) == train(*there, 6)
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert open_files(tmp_path) > 0
    with here[0].updates.shown([here[1]]), there[0].updates.shown([there[1]]):
        for (name, p), q in zip(here[0].module.named_parameters(), there[0].module.parameters(), strict=True):
            assert torch.equal(p, q), name
            for key, value in here[1].state[p].items():
                other = there[1].state[q][key]
                pairs = [(value[k], other[k]) for k in value] if isinstance(value, dict) else [(value, other)]
                assert all(torch.equal(a, b) for a, b in pairs), f"{name} {key}"
    assert not [value for state in there[1].state.values() for value in state.values() if value.numel() >= 4096]
    for replica, _ in (here, there):
        replica.close()
    for p, q in zip(here[0].module.parameters(), there[0].module.parameters(), strict=True):
        assert p.dtype == q.dtype == (torch.float64 if plan.precision == "float64" else torch.float32)
        assert torch.equal(p, q)
    assert open_files(tmp_path) == 0


def test_pieces_of_a_block_are_all_that_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = 0, 0
    make, take = Spill.buffer, Spill.recycle

    def buffer(self: Spill, dtype: torch.dtype, count: int) -> Any:
        nonlocal held, most
        held += count * dtype.itemsize
        most = max(most, held)
        return make(self, dtype, count)

    def recycle(self: Spill, one: Any) -> None:
        nonlocal held
        held -= one.data.nbytes
        take(self, one)

    monkeypatch.setattr(Spill, "buffer", buffer)
    monkeypatch.setattr(Spill, "recycle", recycle)
    replica, optimizer = started(Plan(offload=DISK), tmp_path)
    train(replica, optimizer, 3)
    block = sum(p.numel() for p in replica.module.get_submodule("blocks.0").parameters())
    assert 0 < most <= 8 * block, "two states in float32"
    assert isinstance(replica.updates, PiecewiseUpdates)
    assert replica.updates.buffered <= 8 * block + 10 * ALIGN, "what is used again is rounded up to whole pages"
    assert held == 0
    replica.close()


def on_two(rank: Rank, plan: Plan, folder: str) -> list[float]:
    module = gpt()
    replica = parallelize(module, plan, rank.mesh(plan), scratch=folder)
    return train(replica, torch.optim.AdamW(module.parameters(), lr=3e-3), 4)


def test_replicas_have_a_file_each(tmp_path: Path) -> None:
    found = run_ranks(2, on_two, Plan(data=2, offload=DISK), str(tmp_path))
    assert found == run_ranks(2, on_two, Plan(data=2), str(tmp_path))


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    def limited(rank: Rank) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        replica, optimizer = started(Plan(offload=DISK), tmp_path)
        with pytest.raises(RunError) as caught:
            train(replica, optimizer, 2)
        replica.close()
        return str(caught.value)

    said = run_ranks(1, limited)[0]
    assert "File too large" in said
    assert str(tmp_path) in said
    assert "last checkpoint" in said


def test_a_disk_without_room_says_so(tmp_path: Path) -> None:
    """A file system of its own, of 256 KB, where one may be mounted."""
    room = tmp_path / "small"
    room.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k none {room} 2>/dev/null") != 0:
        pytest.skip("mounting needs root")
    try:
        replica, optimizer = started(Plan(offload=DISK), room)
        with pytest.raises(RunError, match="No space left on device"):
            train(replica, optimizer, 2)
        replica.close()
    finally:
        os.system(f"umount {room}")


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="could not be created"):
        started(Plan(offload=DISK), tmp_path / "missing")


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    spill = Spill(tmp_path)
    assert direct or not spill.direct
    places = [spill.reserve(3 * ALIGN + 5), spill.reserve(8)]
    for number, place in enumerate(places):
        buffer = spill.buffer(torch.uint8, min(place.size, 2 * ALIGN))
        buffer.data.fill_(number + 1)
        spill.wait(spill.later(spill.write, place, 0, buffer))
    assert spill.read(places[0], ALIGN, torch.uint8, ALIGN).data.eq(1).all()
    assert spill.mapped(places[1], torch.uint8, 8).eq(2).all()
    spill.mapped(places[1], torch.uint8, 8).fill_(7)
    spill.settle()
    assert spill.read(places[1], 0, torch.uint8, 8).data.eq(7).all()
    spill.close()


def test_host_memory_of_a_cpu_is_refused() -> None:
    with pytest.raises(SpecError, match="computes in host memory already"):
        started(Plan(offload=Offload(optimizer="host")))


def test_a_frozen_and_thawed_parameter_keeps_its_states(tmp_path: Path) -> None:
    def losses(plan: Plan) -> list[float]:
        replica, optimizer = started(plan, tmp_path)
        frozen = replica.module.get_submodule("blocks.0")
        found = train(replica, optimizer, 2)
        frozen.requires_grad_(False)
        found += train(replica, optimizer, 2, first=2)
        frozen.requires_grad_(True)
        return found + train(replica, optimizer, 2, first=4)

    assert losses(Plan(offload=DISK)) == losses(Plan())


def test_channels_last_weights_are_stepped_in_their_own_order(tmp_path: Path) -> None:
    def weights(plan: Plan) -> torch.Tensor:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64, 2)).to(
            memory_format=torch.channels_last
        )
        named = list(module.named_parameters())
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        how = PiecewiseUpdates(module, named, plan, tmp_path)
        for number in range(3):
            g = torch.Generator().manual_seed(number)
            for _, p in named:
                p.grad = torch.randn(p.shape, generator=g)  # rows first, unlike the weight
            how.step([optimizer])
        return module[0].weight.detach().clone()

    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for number in range(3):
        g = torch.Generator().manual_seed(number)
        for p in plain.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    assert torch.equal(weights(Plan(offload=DISK)), plain[0].weight)


def test_a_wait_for_the_disk_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr("shardwise.parallel.spill.LIMIT_S", 0.05)
    spill, never = Spill(tmp_path), threading.Event()
    with pytest.raises(RunError, match="did not answer"):
        spill.wait(spill.later(never.wait))
    never.set()
    spill.close()


def sharded(rank: Rank, plan: Plan, folder: str) -> list[float]:
    module = gpt()
    replica = parallelize(module, plan, rank.mesh(plan), scratch=folder)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    found = train(replica, optimizer, 4)
    assert not [v for state in optimizer.state.values() for v in state.values() if v.numel() >= 4096] or not folder
    return found


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shards_have_their_rows_of_the_states_on_disk(tmp_path: Path, zero: int) -> None:
    plan = Plan(shard=2, zero=zero, offload=DISK)
    assert run_ranks(2, sharded, plan, str(tmp_path)) == run_ranks(2, sharded, Plan(shard=2, zero=zero), "")


def test_hooks_around_a_step_run_once_and_see_whole_gradients(tmp_path: Path) -> None:
    replica, optimizer = started(Plan(offload=DISK), tmp_path)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.shape == p.shape for p in replica.module.parameters()])
    )
    optimizer.register_step_post_hook(lambda *_: seen.append([]))
    train(replica, optimizer, 2)
    count = len(list(replica.module.parameters()))
    assert seen == [[True] * count, []] * 2
