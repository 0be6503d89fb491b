"""What was saved on any number of ranks, under any plan, comes back bit for bit on any other."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardwise.checkpoint.load import latest, load, newest_whole
from shardwise.checkpoint.manifest import read
from shardwise.checkpoint.resume import restore, resume
from shardwise.checkpoint.save import save
from shardwise.checkpoint.state import collect
from shardwise.checkpoint.store import LocalStore, MemoryStore
from shardwise.checkpoint.tensorfile import DTYPES, dtype_of
from shardwise.spec.layout import boxes, holds, local_offsets, local_shape
from shardwise.spec.plan import Plan, Split, Stage
from tests.cpu.checkpoint.world import Net, bits, on_ranks, optimizers_of, raw, save_alone, save_on, train, trained


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_resumes_what_any_number_saved(tmp_path: Path, world: int) -> None:
    net, optimizers = trained()
    tensors, scalars = collect(net, optimizers)
    saved = save_on(world, LocalStore(tmp_path), step=7, tensors=tensors, scalars={**scalars, "data": {"step": 7}})
    assert {getattr(one, "folder", one) for one in saved} == {"step-00000007"}
    for new_world in (1, 2, 3, 4):
        for rank in range(new_world):
            fresh = Net(seed=1)
            fresh_optimizers = optimizers_of(fresh)
            found = resume(LocalStore(tmp_path), fresh, fresh_optimizers, plan=Plan(data=new_world), rank=rank)
            assert found is not None
            assert (found.step, found.scalars["data"], found.manifest.plan.ranks) == (7, {"step": 7}, world)
            again, described = collect(fresh, fresh_optimizers)
            assert bits(again) == bits(tensors)
            assert described == scalars


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    net, optimizers = trained(steps=2)
    tensors, scalars = collect(net, optimizers)
    save_on(2, LocalStore(tmp_path), tensors=tensors, scalars=scalars)
    fresh = Net(seed=3)
    fresh_optimizers = optimizers_of(fresh)
    resume(LocalStore(tmp_path), fresh, fresh_optimizers, plan=Plan(), rank=0)
    train(net, optimizers, 3)
    train(fresh, fresh_optimizers, 3)
    assert bits(collect(fresh, fresh_optimizers)[0]) == bits(collect(net, optimizers)[0])
    assert fresh.head.weight is fresh.embed.weight


PLANS = [
    Plan(),
    Plan(data=3),
    Plan(shard=4),
    Plan(shard=2, zero=1, data=2),
    Plan(tensor=2, splits={"qkv": Split(how="column", parts=(2, 1, 1, 1, 1, 0)), "out": Split(how="row")}),
    Plan(tensor=2, shard=2, splits={"qkv": Split(how="column", parts=(2, 1, 1, 1, 1, 0))}),
    Plan(tensor=3, splits={"qkv.weight": Split(how="column"), "out": Split(how="row", parts=(1, 0, 4))}),
    Plan(pipeline=2, blocks=("a", "b"), stages=(Stage(first=0, last=0), Stage(first=1, last=1)), data=2),
]
SHAPES = {
    "model/a.qkv.weight": (12, 5),
    "model/a.qkv.bias": (12,),
    "model/b.out.weight": (4, 5),
    "model/b.scale": (),
    "model/embed": (7, 3),
    "model/empty": (0, 2),
    "optimizer/a.qkv.weight/exp_avg": (12, 5),
    "optimizer/a.qkv.weight/step": (),
    "buffer/b.mean": (5,),
}


def cut(tensors: dict[str, torch.Tensor], plan: Plan, rank: int) -> dict[str, torch.Tensor]:
    """This rank's local tensors, cut from the global ones."""
    found = {}
    for name, tensor in tensors.items():
        if holds(name, plan, rank):
            shape = tuple(tensor.shape)
            found[name] = torch.full(local_shape(name, shape, plan, rank), -1.0)
            held = boxes(name, shape, plan, rank)
            for box, start in zip(held, local_offsets(held), strict=True):
                place = tuple(slice(o, o + s) for o, s in zip(start, box.shape, strict=True))
                found[name][place] = tensor[box.slices]
    return found


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_any_plan_loads_what_any_plan_saved(plan: Plan) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    store = MemoryStore()
    saved = on_ranks(
        plan.ranks,
        lambda rank, barrier: save(
            store,
            step=1,
            tensors=cut(tensors, plan, rank),
            scalars={},
            plan=plan,
            rank=rank,
            world=plan.ranks,
            barrier=barrier,
            shapes=SHAPES,
        ),
    )
    assert [type(one).__name__ for one in saved] == ["Saved"] * plan.ranks
    manifest = newest_whole(store)
    assert manifest is not None
    for other in PLANS:
        for rank in range(other.ranks):
            expected = cut(tensors, other, rank)
            wanted = {name: torch.full_like(tensor, 9.0) for name, tensor in expected.items()}
            load(store, manifest, wanted, other, rank)
            assert bits(wanted) == bits(expected)


def test_a_rank_reads_only_the_files_that_hold_something_of_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    plan = Plan(shard=4)
    tensors = {"model/w": torch.randn(8, 3)}
    on_ranks(
        4,
        lambda rank, barrier: save(
            store,
            step=1,
            tensors=cut(tensors, plan, rank),
            scalars={},
            plan=plan,
            rank=rank,
            world=4,
            barrier=barrier,
            shapes={"model/w": (8, 3)},
        ),
    )
    manifest = latest(store)
    assert manifest is not None
    (tmp_path / manifest.folder / "rank-3.safetensors").unlink()
    wanted = {"model/w": torch.zeros(4, 3)}
    load(store, manifest, wanted, Plan(shard=2), 0)
    assert torch.equal(wanted["model/w"], tensors["model/w"][:4])


@pytest.mark.parametrize("store", [MemoryStore(), None], ids=["memory", "local"])
def test_every_dtype_and_shape(tmp_path: Path, store: MemoryStore | None) -> None:
    place = store or LocalStore(tmp_path)
    tensors = {}
    for name in DTYPES:
        size = dtype_of(name).itemsize
        flat = torch.arange(60 * size).remainder(2 if name == "bool" else 251).to(torch.uint8).view(dtype_of(name))
        tensors[f"model/{name}/strided"] = flat.reshape(10, 6).t()
        tensors[f"model/{name}/sliced"] = flat.reshape(10, 6)[3:7, ::2]
        tensors[f"model/{name}/scalar"] = flat[3].clone()
        tensors[f"model/{name}/empty"] = flat.reshape(10, 6)[:, :0]
    # one tensor is long enough that the three ranks cut it
    tensors["model/long"] = torch.randn(3000, 64)
    saved = save_on(3, place, tensors=tensors)
    assert [type(one).__name__ for one in saved] == ["Saved"] * 3
    manifest = newest_whole(place)
    assert manifest is not None
    assert len(manifest.tensors["model/long"].pieces) > 3
    wanted = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    load(place, manifest, wanted, Plan(data=2), 1)
    assert bits(wanted) == bits(tensors)


def test_the_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "model/a": torch.randn(3, 4),
        "model/b": torch.tensor(True),
        "model/\N{GREEK SMALL LETTER ALPHA}": torch.randn(5, dtype=torch.float64).bfloat16(),
    }
    save_alone(LocalStore(tmp_path), tensors=tensors)
    found = load_file(tmp_path / "step-00000001" / "rank-0.safetensors")
    assert bits(found) == bits(tensors)


def test_nan_payloads_and_signed_zeros_survive() -> None:
    store = MemoryStore()
    odd = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 0x00000001], dtype=torch.int64).to(torch.int32)
    tensors = {"model/w": odd.view(torch.float32)}
    save_alone(store, tensors=tensors)
    wanted = {"model/w": torch.zeros(4)}
    manifest = latest(store)
    assert manifest is not None
    load(store, manifest, wanted, Plan(), 0)
    assert raw(wanted["model/w"]) == raw(odd)


def test_scalars_come_back_as_they_were() -> None:
    store = MemoryStore()
    scalars = {
        "best": float("inf"),
        "loss": float("nan"),
        "betas": (0.9, 0.999),
        "seed": 2**127 + 1,
        "history": {3: [1.5, None], "$odd": True},
        "text": "\N{SNOWMAN}",
    }
    save_on(2, store, scalars=scalars)
    manifest = newest_whole(store)
    assert manifest is not None
    wanted = {"model/w": torch.zeros(6)}
    found = load(store, manifest, wanted, Plan(), 0)
    assert repr(found) == repr(scalars)


def test_the_model_alone_can_be_loaded_of_a_full_checkpoint(tmp_path: Path) -> None:
    net, optimizers = trained()
    tensors, scalars = collect(net, optimizers)
    save_alone(LocalStore(tmp_path), tensors=tensors, scalars=scalars)
    fresh = Net(seed=1)
    restore(LocalStore(tmp_path), read(LocalStore(tmp_path), "step-00000001"), fresh)
    model = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    assert bits(collect(fresh)[0]) == bits(model)


def test_further_tensors_are_saved_by_their_names() -> None:
    net, _ = trained()
    store = MemoryStore()
    tensors, scalars = collect(net)
    state = torch.arange(16, dtype=torch.uint8)
    save_alone(store, tensors={**tensors, "extra/generator": state}, scalars=scalars)
    wanted = torch.zeros(16, dtype=torch.uint8)
    assert resume(store, Net(seed=1), plan=Plan(), rank=0, extra={"extra/generator": wanted}) is not None
    assert torch.equal(wanted, state)


def test_an_empty_store_has_nothing_to_resume(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "not" / "there")
    assert resume(store, Net(seed=0), plan=Plan(), rank=0) is None
    assert latest(store) is None
    assert newest_whole(store) is None


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    tensors = {f"model/{i}": torch.randn(64, 256) for i in range(30)}
    for world, step in itertools.product((2, 3, 4), (1,)):
        save_on(world, LocalStore(tmp_path), step=step + world, tensors=tensors)
        manifest = latest(LocalStore(tmp_path))
        assert manifest is not None
        sizes = [facts.bytes for facts in manifest.files.values()]
        assert len(sizes) == world
        assert max(sizes) < 1.1 * sum(sizes) / world
