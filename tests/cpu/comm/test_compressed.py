"""Lossy sums with error feedback, on several ranks, against sums in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.comm.compressed import CompressedSum
from shardwise.comm.group import Group
from shardwise.comm.kernel import library
from shardwise.comm.methods import make_sum
from shardwise.errors import CheckpointError, SpecError
from shardwise.spec.sync import Sync
from tests.cpu.comm.sums import ONE, SHAPES, TAIL, TWO, Buckets, gradients, tail_of
from tests.ranks import Rank, run_ranks

METHODS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {},
    "topk": {"density": 0.05},
    "powersgd": {"rank": 2},
}
EVERY = sorted(METHODS)


@pytest.fixture(params=["gloo", "shm"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks inherit it."""
    if request.param == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    monkeypatch.setenv("SHARDWISE_TRANSPORT", request.param)


def group_of(rank: Rank) -> Group:
    group = rank.mesh().axis("data").group
    assert group is not None
    return group


def make(group: Group, method: str, *, start: int = 0, feedback: bool = True) -> CompressedSum:
    return make_sum(group, Sync(word="compressed", method=method, start=start, **METHODS[method]), feedback=feedback)


def total(ranks: int, step: int) -> dict[str, Tensor]:
    each = [gradients(r, step) for r in range(ranks)]
    return {name: torch.stack([g[name].double() for g in each]).sum(0) for name in SHAPES}


def residuals(exchange: CompressedSum) -> dict[str, Tensor]:
    return {k.removeprefix("residual."): v.clone() for k, v in exchange.state().items() if k.startswith("residual.")}


def several_steps(rank: Rank, method: str, steps: int, dtype: torch.dtype, mean: bool, feedback: bool) -> Any:
    group = group_of(rank)
    buckets = Buckets(SHAPES, TWO, dtype)
    exchange = make(group, method, feedback=feedback)
    exchange.arrange(buckets.layout)
    applied, tails = [], []
    for step in range(steps):
        sums, tail = buckets.step(exchange, gradients(rank.rank, step), tail_of(rank.rank, step), mean=mean)
        applied.append(sums)
        tails.append(tail)
    return applied, tails, residuals(exchange), group.wire


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("method", EVERY)
def test_what_was_summed_and_what_is_left_are_the_gradients(method: str, ranks: int) -> None:
    """The law of error feedback, and the same bits on every rank; the tail is the exact sum."""
    steps = 6
    found = run_ranks(ranks, several_steps, method, steps, torch.float32, False, True)
    for step in range(steps):
        expected = torch.stack([tail_of(r, step).double() for r in range(ranks)]).sum(0)
        for applied, tails, _, _ in found:
            assert torch.equal(tails[step].double(), expected)
            for name in SHAPES:
                assert torch.equal(applied[step][name], found[0][0][step][name]), (name, step)
    true = [total(ranks, step) for step in range(steps)]
    for name in SHAPES:
        asked = sum(t[name] for t in true)
        given = sum(applied[name].double() for applied in found[0][0])
        left = sum(rest[name].double() for _, _, rest, _ in found)
        scale = sum(float(t[name].abs().max()) for t in true)
        assert (given + left - asked).abs().max() <= 2e-6 * scale, name
    for _, _, rest, _ in found:
        assert rest["wide"].any()
        assert not rest["bias"].any()  # vectors are sent as they are


@pytest.mark.parametrize("method", EVERY)
def test_the_mean_is_the_sum_by_the_number_of_ranks(method: str) -> None:
    sums = run_ranks(2, several_steps, method, 3, torch.float32, False, True)[0]
    means = run_ranks(2, several_steps, method, 3, torch.float32, True, True)[0]
    for one, other in zip(sums[0], means[0], strict=True):
        for name in SHAPES:
            torch.testing.assert_close(other[name], one[name] / 2)
    for one_tail, other_tail in zip(sums[1], means[1], strict=True):
        torch.testing.assert_close(other_tail, one_tail / 2)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", EVERY)
def test_gradients_of_other_types(method: str, dtype: torch.dtype, ranks: int) -> None:
    """Sums of bfloat16 gradients are rounded to bfloat16, so there the law holds up to that."""
    steps = 4
    found = run_ranks(ranks, other_type, method, steps, dtype)
    for name in SHAPES:
        asked = sum(
            g[name].to(dtype).double() for step in range(steps) for g in (gradients(r, step) for r in range(ranks))
        )
        given = sum(applied[name].double() for applied in found[0][0])
        left = sum(rest[name].double() for _, rest in found)
        scale = sum(float(total(ranks, step)[name].abs().max()) for step in range(steps))
        assert (given + left - asked).abs().max() <= (2e-6 if dtype == torch.float64 else 8e-3) * scale, name
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found[0][0], found[1][0], strict=True))


def other_type(rank: Rank, method: str, steps: int, dtype: torch.dtype) -> Any:
    buckets = Buckets(SHAPES, TWO, dtype)
    exchange = make(group_of(rank), method)
    exchange.arrange(buckets.layout)
    tail = torch.ones(TAIL)
    applied = [buckets.step(exchange, gradients(rank.rank, step), tail)[0] for step in range(steps)]
    return applied, residuals(exchange)


@pytest.mark.parametrize(("method", "most"), [("bf16", 0.004), ("int8", 0.01)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_step_is_near_the_sum(method: str, most: float, ranks: int) -> None:
    """Of all gradients together: small ones that share a block with a large neighbour are off by more of themselves."""
    applied, _, _, _ = run_ranks(ranks, several_steps, method, 1, torch.float32, False, False)[0]
    true = total(ranks, 0)
    off = math.hypot(*(float((applied[0][name].double() - true[name]).norm()) for name in SHAPES))
    assert off <= most * math.hypot(*(float(true[name].norm()) for name in SHAPES))


def test_powersgd_is_exact_for_what_has_its_rank() -> None:
    """Sums of rank 2 come back as they are, vectors and small matrices in any case."""
    for applied, true in run_ranks(3, low_rank):
        for name in ("wide", "embedding", "bias", "scale", "cut"):
            assert float((applied[-1][name] - true[name]).norm()) <= 1e-5 * float(true[name].norm()), name


def low_rank(rank: Rank) -> Any:
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), "powersgd", feedback=False)
    exchange.arrange(buckets.layout)
    given = [gradients(r, 0) for r in range(rank.world)]
    for r, mine in enumerate(given):
        for name in ("wide", "embedding"):
            rows, columns = SHAPES[name]
            g = torch.Generator().manual_seed(9)
            left, right = torch.randn(rows, 2, generator=g), torch.randn(2, columns, generator=g)
            mine[name] = left * torch.tensor([1.0, float(r + 1)]) @ right
    applied = [buckets.step(exchange, given[rank.rank], torch.zeros(TAIL))[0] for _ in range(3)]
    return applied, {name: sum(g[name] for g in given) for name in SHAPES}


# Arrangement and state.


def rearranged(rank: Rank, method: str) -> Any:
    """Three steps in two buckets, one frozen parameter for two steps, then one bucket in another order."""
    group = group_of(rank)
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group, method)
    exchange.arrange(buckets.layout)
    for step in range(3):
        buckets.step(exchange, gradients(rank.rank, step), tail_of(rank.rank, step))
    before = residuals(exchange)
    fewer = Buckets(SHAPES, (("embedding",), ("scale", "conv", "bias", "cut")))
    exchange.arrange(fewer.layout)
    between = residuals(exchange)
    for step in range(2):
        fewer.step(exchange, gradients(rank.rank, step), tail_of(rank.rank, step))
    thawed = residuals(exchange)["wide"]
    other = Buckets(SHAPES, ONE)
    exchange.arrange(other.layout)
    after = residuals(exchange)
    sums, _ = other.step(exchange, gradients(rank.rank, 3), tail_of(rank.rank, 3))
    return before, between, thawed, after, sums, residuals(exchange)


@pytest.mark.parametrize("method", EVERY)
def test_residuals_are_kept_by_name_when_buckets_change(method: str) -> None:
    found = run_ranks(2, rearranged, method)
    for before, between, thawed, after, _, _ in found:
        assert before["wide"].any()
        for name in SHAPES:
            assert torch.equal(before[name], between[name]), name
        assert torch.equal(thawed, before["wide"])
        assert torch.equal(after["wide"], before["wide"])
    asked = total(2, 3)["wide"] + sum(f[2].double() for f in found)
    given = found[0][4]["wide"].double() + sum(f[5]["wide"].double() for f in found)
    assert (asked - given).abs().max() <= 1e-5 * asked.abs().max()


def saved(rank: Rank, method: str) -> Any:
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), method, start=1)
    exchange.arrange(buckets.layout)
    for step in range(3):
        buckets.step(exchange, gradients(rank.rank, step), tail_of(rank.rank, step))
    state = {k: v.clone() for k, v in exchange.state().items()}
    later = [buckets.step(exchange, gradients(rank.rank, s), tail_of(rank.rank, s))[0] for s in (3, 4)]
    return state, later


def resumed(rank: Rank, method: str, states: list[dict[str, Tensor]], arrange_first: bool) -> Any:
    buckets = Buckets(SHAPES, ONE)
    exchange = make(group_of(rank), method, start=1)
    if arrange_first:
        exchange.arrange(buckets.layout)
    exchange.load_state(states, rank.rank)
    if not arrange_first:
        exchange.arrange(buckets.layout)
    kept = {k: v.clone() for k, v in exchange.state().items()}
    again = Buckets(SHAPES, TWO)
    exchange.arrange(again.layout)
    later = [again.step(exchange, gradients(rank.rank, s), tail_of(rank.rank, s))[0] for s in (3, 4)]
    return kept, later


@pytest.mark.parametrize("arrange_first", [True, False])
@pytest.mark.parametrize("method", EVERY)
def test_a_run_goes_on_from_its_state_bit_for_bit(method: str, arrange_first: bool) -> None:
    found = run_ranks(2, saved, method)
    states = [state for state, _ in found]
    for me, (kept, later) in enumerate(run_ranks(2, resumed, method, states, arrange_first)):
        assert kept.keys() == states[me].keys()
        assert all(torch.equal(kept[key], states[me][key]) for key in kept)
        for one, other in zip(later, found[me][1], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in SHAPES)


@pytest.mark.parametrize("method", EVERY)
def test_another_number_of_ranks_shares_what_was_left_out(method: str) -> None:
    states = [state for state, _ in run_ranks(2, saved, method)]
    found = [kept for kept, _ in run_ranks(3, resumed, method, states, True)]
    for key in states[0]:
        if key.startswith("residual."):
            torch.testing.assert_close(sum(s[key].double() for s in found), sum(s[key].double() for s in states))
            assert all(torch.equal(s[key], found[0][key]) for s in found)
        else:
            assert all(torch.equal(s[key], states[0][key]) for s in found)


def switched(rank: Rank, method: str, states: list[dict[str, Tensor]]) -> Any:
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), method)
    exchange.arrange(buckets.layout)
    exchange.load_state(states, rank.rank)
    applied = [buckets.step(exchange, gradients(rank.rank, s), tail_of(rank.rank, s))[0] for s in (3, 4)]
    return applied, residuals(exchange)


@pytest.mark.parametrize("method", ["powersgd", "int8"])
def test_what_another_method_left_out_arrives_once(method: str) -> None:
    """Also where this method sends what the other one did not: vectors, small matrices."""
    left = [{f"residual.{n}": g for n, g in gradients(r, 7).items()} for r in range(2)]
    found = run_ranks(2, switched, method, left)
    for name in SHAPES:
        asked = total(2, 7)[name] + total(2, 3)[name] + total(2, 4)[name]
        given = sum(sums[name].double() for sums in found[0][0]) + sum(rest[name].double() for _, rest in found)
        assert (given - asked).abs().max() <= 1e-5 * asked.abs().max(), name


def another_model(rank: Rank) -> str:
    exchange = make(group_of(rank), "int8")
    exchange.arrange(Buckets({"a": (3, 4)}, (("a",),)).layout)
    with pytest.raises(CheckpointError) as told:
        exchange.load_state([{"residual.a": torch.ones(5)}] * 2, rank.rank)
    return str(told.value)


def test_the_state_of_another_model_is_refused() -> None:
    assert "'a' has shape (5,), its parameter (3, 4)" in run_ranks(2, another_model)[0]


# Exact steps, scales, and steps that go wrong.


def warmed_up(rank: Rank, method: str) -> Any:
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), method, start=2)
    exchange.arrange(buckets.layout)
    steps = []
    for step in range(5):
        exchange.exact = step == 4
        steps.append(buckets.step(exchange, gradients(rank.rank, step), tail_of(rank.rank, step))[0])
        if step == 3:
            left = residuals(exchange)
    return steps, left, residuals(exchange)


@pytest.mark.parametrize("method", EVERY)
def test_exact_steps_are_exact_and_take_in_what_was_left(method: str) -> None:
    found = run_ranks(2, warmed_up, method)
    for name in SHAPES:
        for step in (0, 1):
            torch.testing.assert_close(found[0][0][step][name].double(), total(2, step)[name])
        if name == "wide":
            assert not torch.allclose(found[0][0][2][name].double(), total(2, 2)[name])
        asked = total(2, 4)[name] + sum(left[name].double() for _, left, _ in found)
        torch.testing.assert_close(
            found[0][0][4][name].double(), asked, rtol=1e-5, atol=1e-5 * float(asked.abs().max())
        )
        assert not any(rest[name].any() for _, _, rest in found)


def rescaled(rank: Rank, method: str, scales: list[float]) -> Any:
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), method)
    exchange.arrange(buckets.layout)
    given = []
    for step, scale in enumerate(scales):
        exchange.rescale(scale)
        scaled = {name: g * scale for name, g in gradients(rank.rank, step).items()}
        sums, _ = buckets.step(exchange, scaled, tail_of(rank.rank, step))
        given.append({name: value / scale for name, value in sums.items()})
    return given, residuals(exchange)


@pytest.mark.parametrize("method", EVERY)
def test_residuals_follow_the_scale_of_the_gradients(method: str) -> None:
    """A scale that is a power of two changes no bit of what is applied."""
    plain = run_ranks(2, rescaled, method, [1.0, 1.0, 1.0])
    scaled = run_ranks(2, rescaled, method, [64.0, 0.5, 2.0**14])
    for (one, left), (other, also_left) in zip(plain, scaled, strict=True):
        for step, name in [(s, n) for s in range(3) for n in SHAPES]:
            torch.testing.assert_close(one[step][name], other[step][name], rtol=1e-5, atol=0)
        torch.testing.assert_close(
            left["wide"], also_left["wide"], rtol=1e-5, atol=1e-6 * float(left["wide"].abs().max())
        )


def spoilt(rank: Rank, method: str, bad: float) -> Any:
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), method)
    exchange.arrange(buckets.layout)
    for step in range(2):
        buckets.step(exchange, gradients(rank.rank, step), tail_of(rank.rank, step))
    before = residuals(exchange)
    wrong = gradients(rank.rank, 2)
    if rank.rank == 1:
        wrong["wide"][3, 7] = bad
    sums, _ = buckets.step(exchange, wrong, tail_of(rank.rank, 2))
    after = residuals(exchange)
    later = [buckets.step(exchange, gradients(rank.rank, s), tail_of(rank.rank, s))[0] for s in range(3, 9)]
    return before, sums, after, later, residuals(exchange)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", EVERY)
def test_a_gradient_that_is_not_finite_is_seen_by_all_and_leaves_no_trace(method: str, bad: float, ranks: int) -> None:
    found = run_ranks(ranks, spoilt, method, bad)
    for before, sums, after, later, last in found:
        assert not torch.isfinite(sums["wide"]).all()
        assert torch.isfinite(sums["embedding"]).all()  # of another bucket
        assert all(torch.isfinite(each).all() for each in [*after.values(), *last.values()])
        assert all(torch.isfinite(each).all() for sums in later for each in sums.values())
        assert torch.isfinite(before["wide"]).all()
    before, _, after, _, _ = found[1]
    atol = 1e-5 * float(gradients(1, 2)["wide"].abs().max())
    kept = torch.isclose(before["wide"], after["wide"], rtol=0, atol=atol)
    assert int((~kept).sum()) <= (1 if ranks == 2 or method == "powersgd" else before["wide"].numel() // 2)


def interrupted(rank: Rank, method: str) -> Any:
    """A step of which only the first bucket was sent, and never waited for."""
    buckets = Buckets(SHAPES, TWO)
    exchange = make(group_of(rank), method)
    exchange.arrange(buckets.layout)
    buckets.step(exchange, gradients(rank.rank, 0), tail_of(rank.rank, 0))
    for name, view in buckets.views().items():
        view.copy_(gradients(rank.rank, 1)[name])
    bucket, flat = buckets.layout[0], buckets.flats[0]
    exchange.start(0, flat, flat[: bucket.numel], flat[bucket.numel :], mean=False)
    return [buckets.step(exchange, gradients(rank.rank, s), tail_of(rank.rank, s)) for s in (2, 3)]


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("method", EVERY)
def test_a_step_after_an_interrupted_one(method: str, ranks: int) -> None:
    found = run_ranks(ranks, interrupted, method)
    for steps in found:
        for (sums, tail), (first, _), step in zip(steps, found[0], (2, 3), strict=True):
            assert all(torch.equal(sums[name], first[name]) for name in SHAPES)
            assert torch.equal(tail.double(), torch.stack([tail_of(r, step).double() for r in range(ranks)]).sum(0))


# The wire.


@pytest.mark.usefixtures("transport")
def test_messages_and_bytes() -> None:
    for ranks in (2, 3):
        for method in EVERY:
            wire = run_ranks(ranks, several_steps, method, 1, torch.float32, False, True)[0][3]
            if method == "powersgd":  # a first message a bucket, one second message for both
                assert wire["all_reduce"][0] == 3
            elif ranks == 2:
                assert wire["all_gather"][0] == 2
            else:
                assert (wire["all_to_all"][0], wire["all_gather"][0]) == (2, 2)
            everything = sum(b for _, b in wire.values())
            assert everything < 0.85 * 4 * sum(math.prod(s) for s in SHAPES.values())


UNEQUAL_THREADS = """
import torch
from shardwise.comm.powersgd import orthonormal
found = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(1)
    p, q = torch.randn(4096, 4, generator=g), torch.randn(1376, 4, generator=g)
    p[:, 3] = p[:, 0] + 1e-6 * p[:, 3]
    found.append((left := orthonormal(p), left @ q.t()))
assert all(torch.equal(a, b) for a, b in zip(*found))
"""


def test_powersgd_rebuilds_the_same_bits_with_other_threads() -> None:
    """In a process of its own: after a fork torch has one thread only."""
    subprocess.run([sys.executable, "-c", UNEQUAL_THREADS], check=True, timeout=60)


def nothing_but_a_tail(rank: Rank) -> list[float]:
    buckets = Buckets({}, ((),))
    exchange = make(group_of(rank), "int8")
    exchange.arrange(buckets.layout)
    sums: list[float] = buckets.step(exchange, {}, torch.full((TAIL,), float(rank.rank + 1)))[1].tolist()
    return sums


def test_a_bucket_of_statistics_only() -> None:
    assert run_ranks(3, nothing_but_a_tail) == [[6.0] * TAIL] * 3


def test_a_method_must_be_known() -> None:
    with pytest.raises(SpecError, match="no method"):
        Sync(word="compressed", method="int9")
