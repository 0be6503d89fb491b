"""What keeps less in memory, on ranks that each have a part of the parameters: like one process in the same formats."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from jobs import Micro
from msgspec import structs
from test_low_bit import batch, gpt
from torch import Tensor, nn

from shardwise.checkpoint.load import latest, read_tensors
from shardwise.checkpoint.store import LocalStore
from shardwise.models.cuts import profile_calls
from shardwise.models.losses import cross_entropy, next_token_loss
from shardwise.parallel.low_bit import BLOCK, ERROR, dequantize
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.slots import InMemory, OnDisk
from shardwise.parallel.step import step
from shardwise.parallel.tensor.find import find_splits
from shardwise.parallel.updates import PiecewiseUpdates
from shardwise.plan.stages import with_stages
from shardwise.spec.plan import Offload, Plan, Recompute
from shardwise.spec.profile import ModelProfile
from shardwise.spec.sync import Sync
from shardwise.train.state import Saver, State
from tests.ranks import Rank, run_ranks

STEPS = 8
DISK = Offload(optimizer="disk")
LOW: dict[str, Any] = {"precision": "bfloat16", "parameters": "bfloat16"}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "disk": {"offload": DISK},
    "bfloat16": {"states": "bfloat16"},
    "int8": {"states": "int8"},
    "int8 on disk": {"states": "int8", "offload": DISK},
    "autocast": {"precision": "bfloat16"},
    "masters": LOW,
    "masters on disk": {**LOW, "offload": DISK},
    "no masters": {**LOW, "master": "none"},
    "no masters, int8": {**LOW, "master": "none", "states": "int8"},
}
AXES: dict[str, dict[str, Any]] = {
    "one": {},
    "tensor": {"tensor": 2},
    "sequence, tensor": {"tensor": 2, "sequence": True},
    "zero 1": {"shard": 2, "zero": 1},
    "zero 2": {"shard": 2, "zero": 2},
    "zero 3": {"shard": 2, "zero": 3},
    "zero 1, tensor": {"shard": 2, "zero": 1, "tensor": 2},
    "zero 3, tensor": {"shard": 2, "zero": 3, "tensor": 2},
    "zero 1, pipeline": {"shard": 2, "zero": 1, "pipeline": 2},
    "zero 3, pipeline": {"shard": 2, "zero": 3, "pipeline": 2},
    "data, zero 1": {"data": 2, "shard": 2, "zero": 1},
    "pipeline, tensor": {"pipeline": 2, "tensor": 2},
}


@functools.cache
def splits() -> Any:
    return find_splits(gpt(), batch(0)[0].batch, 2).splits


def plan_of(axes: dict[str, Any], **fields: Any) -> Plan:
    plan = Plan(**axes, splits=splits() if "tensor" in axes else {}, **fields)
    if plan.pipeline == 1:
        return plan
    calls = profile_calls(gpt, batch(0)[0].batch, loss=next_token_loss)
    return with_stages(plan, ModelProfile(blocks=(), calls=calls), lambda stage, first, last: float(last - first + 1))


def share(plan: Plan, rank: int, number: int) -> Any:
    (whole,) = batch(number)
    at = plan.coordinates(rank)
    place, each = at["data"] * plan.shard + at["shard"], 8 // plan.replicas
    cut = {key: value[each * place : each * place + each] for key, value in whole.batch.items()}
    return [whole._replace(batch=cut)]


def begun(rank: Rank, plan: Plan) -> tuple[Replica, torch.optim.Optimizer]:
    replica = parallelize(gpt(), plan, rank.mesh(plan))
    return replica, torch.optim.AdamW(replica.module.parameters(), lr=3e-3)


def trained(rank: Rank, plan: Plan) -> Any:
    """Losses and norms of a few steps, the parameters in the end, and the bytes that this rank holds between steps."""
    replica, optimizer = begun(rank, plan)
    curve = []
    for number in range(STEPS):
        found = step(replica, [optimizer], share(plan, rank.rank, number), loss=next_token_loss, clip_norm=1.0)
        curve.append((found.loss, found.grad_norm))
    held = bytes_held(replica, optimizer)
    replica.gather()
    replica.close()
    return curve, {name: p.detach() for name, p in replica.module.named_parameters()}, held


def bytes_held(replica: Replica, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of this rank, between two steps, and what it has on disk."""
    plain = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    found = {
        "parameters": sum(p.untyped_storage().nbytes() for p in replica.module.parameters()),
        "masters": 0,
        "states": sum(v.nbytes for v in plain),
        "disk": 0,
    }
    kept = replica.updates._kept.values() if isinstance(replica.updates, PiecewiseUpdates) else ()
    for one in kept:
        for place, slots in (("masters", [one.master]), ("states", list(one.slots.values()))):
            for array in [array for slot in slots if slot is not None for array in (slot.main, slot._scales)]:
                if isinstance(array, OnDisk):
                    found["disk"] += array.count * array.dtype.itemsize
                elif isinstance(array, InMemory):
                    found[place] += array._values.untyped_storage().nbytes()
    return found


def apart(one: Any, other: Any) -> tuple[float, float]:
    """The largest relative gap between the losses of two runs, and between all their parameters together."""
    losses = max(abs(a - b) / b for (a, _), (b, _) in zip(one[0], other[0], strict=True))
    square = sum(float((one[1][name] - p).square().sum()) for name, p in other[1].items())
    return losses, (square / sum(float(p.square().sum()) for p in other[1].values())) ** 0.5


def resumed(rank: Rank, plan: Plan, source: str, target: str, steps: tuple[int, int]) -> list[float]:
    """Go on from the checkpoint in `source`, if there is one, through `steps`, and save into `target`."""
    replica, optimizer = begun(rank, plan)
    optimizers, job = SimpleNamespace(optimizers=[optimizer]), SimpleNamespace(keep_last=1)
    saver: Any = Saver(None, replica.mesh, cast(Any, job))
    saver.store, saver.kept = LocalStore(Path(source)), True
    assert saver.resume(replica, optimizers).step == steps[0]
    losses = []
    for number in range(*steps):
        losses.append(step(replica, [optimizer], share(plan, rank.rank, number), loss=next_token_loss).loss)
    saver.store = LocalStore(Path(target))
    saver.save(replica, optimizers, State(step=steps[1], loss=0.0), best=False)
    return losses


def stored(place: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, states in 8 bits as those that they stand for."""
    store = LocalStore(place)
    manifest = latest(store)
    assert manifest is not None
    found = read_tensors(store, manifest, ("model/", "optimizer/"))
    for name in [name for name in found if name.endswith("/codes")]:
        codes, scales = found.pop(name), found.pop(name.replace("/codes", "/block_scales"))
        wide = dequantize(codes.flatten(), scales, signed="exp_avg_sq" not in name)
        found[name.removesuffix("/codes")] = wide.view(codes.shape)
    return found


# The tests.

MIXED = ("masters", "no masters, int8", "int8 on disk")  # where several axes are cut
CASES = [
    (axes, formats)
    for axes, sizes in AXES.items()
    for formats in FORMATS
    if axes != "one" and (formats in MIXED or (formats not in ("float32", "autocast") and "," not in axes))
]
QUICK = {("tensor", "masters on disk"), ("tensor", "no masters, int8"), ("zero 1", "masters"), ("zero 3", "int8")}


def slow(cases: list[tuple[str, str]], quick: set[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*one, marks=[] if one in quick else pytest.mark.slow) for one in cases]


@functools.cache
def one_process(formats: str) -> Any:
    return run_ranks(1, trained, Plan(**FORMATS[formats]))[0]


@pytest.mark.parametrize(("axes", "formats"), slow(CASES, QUICK))
def test_ranks_with_parts_train_like_one_process_in_the_same_formats(axes: str, formats: str) -> None:
    """Sums in another order move parameters by some way in the plan's precision alone. Rounding by chance, and codes
    that fall to the other side, may add to it what they do to one process: the way from it in float32."""
    one, wide = one_process(formats), one_process("autocast" if "masters" in formats else "float32")
    plan = plan_of(AXES[axes], **FORMATS[formats])
    found = run_ranks(plan.ranks, trained, plan)
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert all(torch.equal(p, other[1][name]) for name, p in found[0][1].items())
    assert {p.dtype for p in found[0][1].values()} == {torch.float32}
    by_format = apart(one, wide)
    exact = 3e-2 if "masters" in formats else 1e-4
    losses, values = apart(found[0], one)
    assert losses <= 2e-3 * (plan.precision == "bfloat16") + 1e-6 + 2 * by_format[0]
    assert values <= exact + 2 * by_format[1]


GOING_ON = [
    ("tensor", "int8 on disk"),
    ("zero 1", "masters on disk"),
    ("tensor", "masters"),
    ("tensor", "no masters"),
    ("zero 1", "no masters, int8"),
    ("zero 2", "masters"),
    ("zero 3", "masters"),
    ("zero 3", "int8 on disk"),
    ("zero 1, tensor", "masters"),
    ("zero 3, tensor", "no masters, int8"),
    ("pipeline, tensor", "masters on disk"),
    ("pipeline, tensor", "no masters"),
]


@pytest.mark.parametrize(("axes", "formats"), slow(GOING_ON, set(GOING_ON[:2])))
def test_a_run_goes_on_with_the_same_bits(axes: str, formats: str, tmp_path: Path) -> None:
    plan = plan_of(AXES[axes], **FORMATS[formats])
    whole, half, rest = (str(tmp_path / name) for name in ("whole", "half", "rest"))
    expected = run_ranks(plan.ranks, resumed, plan, whole, whole, (0, 4))
    first = run_ranks(plan.ranks, resumed, plan, half, half, (0, 2))
    second = run_ranks(plan.ranks, resumed, plan, half, rest, (2, 4))
    assert [a + b for a, b in zip(first, second, strict=True)] == expected
    found = stored(Path(rest))
    for name, tensor in stored(Path(whole)).items():
        assert torch.equal(found[name], tensor), name


MOVES = [
    ("tensor", "int8", "zero 1", "masters"),
    ("zero 1", "masters on disk", "tensor", "masters"),
    ("one", "int8", "tensor", "int8 on disk"),
    ("tensor", "int8", "one", "int8"),
    ("one", "int8", "zero 3, tensor", "int8"),
    ("one", "int8", "zero 2", "float32"),
    ("one", "bfloat16", "zero 1", "float32"),
    ("zero 3", "masters", "zero 1", "masters on disk"),
    ("zero 1, tensor", "masters", "one", "float32"),
    ("pipeline, tensor", "bfloat16", "zero 3", "int8"),
    ("tensor", "no masters", "zero 1", "no masters, int8"),
]


@pytest.mark.parametrize(
    ("axes", "formats", "later", "wanted"),
    [pytest.param(*one, marks=[] if number < 2 else pytest.mark.slow) for number, one in enumerate(MOVES)],
)
def test_a_checkpoint_has_the_same_numbers_in_another_layout(
    axes: str, formats: str, later: str, wanted: str, tmp_path: Path
) -> None:
    """Read under another plan and saved at once: parameters to the bit, states but for what their new format loses."""
    before, after = plan_of(AXES[axes], **FORMATS[formats]), plan_of(AXES[later], **FORMATS[wanted])
    run_ranks(before.ranks, resumed, before, str(tmp_path / "a"), str(tmp_path / "a"), (0, 2))
    run_ranks(after.ranks, resumed, after, str(tmp_path / "a"), str(tmp_path / "b"), (2, 2))
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert set(one) == set(other)
    error = {"float32": 0.0, "bfloat16": 2.0**-7, "int8": max(ERROR.values())}[after.states]
    for name, tensor in one.items():
        if name.startswith("model/") or not error:
            assert torch.equal(other[name].float(), tensor.float()), name
        else:
            assert float((other[name].float() - tensor.float()).abs().max()) <= error * float(tensor.abs().max()), name
        assert name.startswith("model/") or name.endswith("/step") or float(tensor.abs().max()) > 0


def alike(rank: Rank, plan: Plan) -> Any:
    replica, optimizer = begun(rank, plan)
    for number in range(3):
        step(replica, [optimizer], share(plan, rank.rank, number), loss=next_token_loss, clip_norm=0.5)
    assert replica.tensors is not None
    whole = {name: p for name, p in replica.named() if name not in replica.tensors.owned}
    with replica.updates.shown([optimizer]):
        return {name: [p.detach().clone(), *optimizer.state[p].values()] for name, p in whole.items()}


@pytest.mark.parametrize(
    "formats", ["no masters, int8", *(pytest.param(f, marks=pytest.mark.slow) for f in ("masters", "bfloat16", "int8"))]
)
def test_what_is_whole_is_rounded_alike_on_all_tensor_ranks(formats: str) -> None:
    """Also matrices, whose states are rounded by chance: the split leaves the second block whole."""
    kept = {name: split for name, split in splits().items() if "blocks.1" not in name and "*" not in name}
    some = kept or {"blocks.0." + name.removeprefix("blocks.*."): s for name, s in splits().items() if "blocks" in name}
    one, other = run_ranks(2, alike, Plan(tensor=2, splits=some, **FORMATS[formats]))
    assert any(values[0].numel() >= 4096 for values in one.values())
    for name, values in one.items():
        assert all(torch.equal(a, b) for a, b in zip(values, other[name], strict=True)), name


def test_parts_are_rounded_each_by_its_own_chance_and_keep_their_mean() -> None:
    """Updates of a third of what bfloat16 can tell apart: the mean over many elements follows them all the same."""
    plan = Plan(shard=2, zero=1, **FORMATS["no masters"])
    one, other = run_ranks(2, nudged, plan)
    assert torch.equal(one, other)
    up = (one - 1) * 2.0**7
    assert sorted(up.unique().tolist()) == [0.0, 1.0]
    assert float(up.mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float((up[:128] == up[128:]).float().mean()) == pytest.approx(5 / 9, abs=0.02), "two chances of a third"


def nudged(rank: Rank, plan: Plan) -> Tensor:
    module = nn.Sequential(nn.Linear(256, 256, bias=False))
    nn.init.ones_(module[0].weight)  # type: ignore[arg-type]
    replica = parallelize(module, plan, rank.mesh(plan))
    optimizer = torch.optim.SGD(module.parameters(), lr=2.0**-7 / 3)

    def loss(output: Tensor, given: Any) -> tuple[Tensor, Tensor]:
        return -output.sum(), output.new_tensor(1.0 * len(output))

    step(replica, [optimizer], [Micro({"input": torch.ones(2, 256)}, 0)], loss=loss)
    replica.gather()
    replica.close()
    return module[0].weight.detach()  # type: ignore[return-value]


BYTES = {  # a parameter's masters, states, and what is on disk
    "float32": (0, 8, 0),
    "disk": (0, 0, 8),
    "bfloat16": (0, 4, 0),
    "int8": (0, 2 + 8 / BLOCK, 0),
    "masters": (4, 8, 0),
    "masters on disk": (0, 0, 12),
    "no masters, int8": (0, 2 + 8 / BLOCK, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("formats", BYTES)
def test_a_rank_holds_the_bytes_of_its_part(formats: str) -> None:
    """Biases and norms, 320 of 114,624 elements, are in float32, and a tensor axis has them whole."""
    masters, states, disk = BYTES[formats]
    count = sum(p.numel() for p in gpt().parameters())
    width = 2 if "masters" in formats else 4
    for axes, here in (("tensor", 1 / 2), ("zero 1", 1), ("zero 3", 1 / 2), ("zero 1, tensor", 1 / 2)):
        plan = plan_of(AXES[axes], **FORMATS[formats])
        part = 1 / (plan.tensor * plan.shard)
        for _, _, held in run_ranks(plan.ranks, trained, plan):
            assert held["parameters"] == pytest.approx(count * width * here, rel=0.01)
            assert held["masters"] == pytest.approx(count * masters * part, rel=0.02, abs=12 * 320)
            assert held["states"] == pytest.approx(count * states * part, rel=0.02, abs=12 * 320)
            assert held["disk"] == pytest.approx(count * disk * part, rel=0.02)


SMALL = Sync(word="compressed", method="int8")


@pytest.mark.parametrize("formats", ["int8 on disk", pytest.param("disk", marks=pytest.mark.slow)])
def test_sums_that_are_compressed_go_with_other_states(formats: str, tmp_path: Path) -> None:
    """With states on disk the bits are those in memory; in 8 bits a run goes on as if nothing had happened."""
    plan = Plan(data=2, sync=SMALL, **FORMATS[formats])
    here = run_ranks(2, trained, structs.replace(plan, offload=Offload()))
    there = run_ranks(2, trained, plan)
    assert here[0][0] == there[0][0] == there[1][0]
    assert all(torch.equal(p, there[1][1][name]) for name, p in here[0][1].items())
    assert there[0][0][-1][0] == pytest.approx(one_process("float32")[0][-1][0], rel=5e-3)
    whole, half, rest = (str(tmp_path / name) for name in ("whole", "half", "rest"))
    expected = run_ranks(2, resumed, plan, whole, whole, (0, 4))
    first = run_ranks(2, resumed, plan, half, half, (0, 2))
    second = run_ranks(2, resumed, plan, half, rest, (2, 4))
    assert [a + b for a, b in zip(first, second, strict=True)] == expected


class Few(nn.Module):
    """Fewer rows than ranks in one of its matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 1500), nn.Linear(1500, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.leave(self.enter(inputs).relu())
        return found


def of_few(rank: Rank, plan: Plan, place: str) -> Any:
    torch.manual_seed(3)
    replica = parallelize(Few(), plan, rank.mesh(plan))
    optimizers: Any = SimpleNamespace(optimizers=[torch.optim.AdamW(replica.module.parameters(), lr=1e-2)])
    saver = Saver(None, replica.mesh, cast(Any, SimpleNamespace(keep_last=1)))
    saver.store, saver.kept = LocalStore(Path(place)), True
    first, losses = saver.resume(replica, optimizers).step, []
    for number in range(first, first + 3):
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(8, 6, generator=draw)
        given = {"inputs": x, "targets": (x[:, :3]).argmax(1)}
        losses.append(step(replica, optimizers.optimizers, [Micro(given, number)], loss=cross_entropy).loss)
    saver.save(replica, optimizers, State(step=first + 3, loss=0.0), best=False)
    return losses


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("formats", ["masters on disk", "int8 on disk"])
def test_ranks_whose_part_is_empty(zero: int, formats: str, tmp_path: Path) -> None:
    plan = Plan(shard=4, zero=zero, **FORMATS[formats])
    for _ in range(2):
        found = run_ranks(4, of_few, plan, str(tmp_path / "four"))
        expected = run_ranks(1, of_few, Plan(**FORMATS[formats]), str(tmp_path / "one"))
        assert found[0] == pytest.approx(expected[0], rel=5e-3)


DISKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tensor": 2}, {"tensor": 2}),
    ({"tensor": 2, "recompute": Recompute(mode="full")}, {"tensor": 2}),
    ({"tensor": 2, "sequence": True}, {"tensor": 2, "sequence": True}),
    ({"tensor": 2, "sequence": True, "recompute": Recompute(mode="selective")}, {"tensor": 2, "sequence": True}),
    ({"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2}),
    ({"tensor": 2, "shard": 2, "zero": 3}, {"tensor": 2, "shard": 2, "zero": 3}),
    ({"shard": 2, "zero": 3, "recompute": Recompute(mode="full")}, {"shard": 2, "zero": 3}),
]


@pytest.mark.parametrize(
    ("fields", "same"), [pytest.param(*d, marks=[] if n == 3 else pytest.mark.slow) for n, d in enumerate(DISKS)]
)
def test_activations_on_disk_are_the_same_bits_with_a_tensor_axis(fields: dict[str, Any], same: dict[str, Any]) -> None:
    plan, expected = plan_of({**fields, "offload": Offload(activations="disk")}), plan_of(same)
    for here, there in zip(run_ranks(plan.ranks, trained, plan), run_ranks(plan.ranks, trained, expected), strict=True):
        assert here[0] == there[0]
        assert all(torch.equal(p, there[1][name]) for name, p in here[1].items())
