"""What keeps less in memory, on ranks that each have a part of the parameters: like one process in the same formats."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_low_bit import batch, gpt
from torch import Tensor

from shardwise.checkpoint.load import latest, read_tensors
from shardwise.checkpoint.store import LocalStore
from shardwise.models.cuts import profile_calls
from shardwise.models.losses import next_token_loss
from shardwise.parallel.low_bit import dequantize
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.slots import InMemory, OnDisk
from shardwise.parallel.step import step
from shardwise.parallel.tensor.find import find_splits
from shardwise.parallel.updates import PiecewiseUpdates
from shardwise.plan.stages import with_stages
from shardwise.spec.plan import Offload, Plan
from shardwise.spec.profile import ModelProfile
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
AXES: dict[str, dict[str, int]] = {
    "tensor": {"tensor": 2},
    "zero 1": {"shard": 2, "zero": 1},
    "zero 2": {"shard": 2, "zero": 2},
    "zero 3": {"shard": 2, "zero": 3},
    "zero 1, tensor": {"shard": 2, "zero": 1, "tensor": 2},
    "zero 3, tensor": {"shard": 2, "zero": 3, "tensor": 2},
    "pipeline, tensor": {"pipeline": 2, "tensor": 2},
}


@functools.cache
def splits() -> Any:
    return find_splits(gpt(), batch(0)[0].batch, 2).splits


def plan_of(axes: dict[str, int], **fields: Any) -> Plan:
    plan = Plan(**axes, splits=splits() if "tensor" in axes else {}, **fields)
    if plan.pipeline == 1:
        return plan
    calls = profile_calls(gpt, batch(0)[0].batch, loss=next_token_loss)
    return with_stages(plan, ModelProfile(blocks=(), calls=calls), lambda stage, first, last: float(last - first + 1))


def share(plan: Plan, rank: int, number: int) -> Any:
    (whole,) = batch(number)
    place, each = plan.coordinates(rank)["shard"], 8 // plan.shard
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

CASES = [(axes, formats) for axes in AXES for formats in FORMATS if formats not in ("float32", "autocast")]
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


@pytest.mark.parametrize(("axes", "formats"), slow(CASES, {("tensor", "int8 on disk"), ("zero 1", "masters on disk")}))
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
