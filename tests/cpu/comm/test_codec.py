"""Codecs: what comes back, how far off it is, and that what is not finite stays visible."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.comm.codec import Blockwise, Codec
from shardwise.comm.kernel import library
from shardwise.comm.methods import CODECS, make_codec
from shardwise.comm.topk import TopK, largest
from shardwise.errors import SpecError
from tests.examples import examples

LENGTHS = [0, 1, 2, 15, 16, 63, 64, 65, 255, 256, 257, 1000, 4096, 70_000, 262_144, 300_001]
EVERY = sorted(CODECS)


def through(codec: Codec, values: Tensor, *, dirty: bool = True) -> Tensor:
    """`values` there and back, in buffers that held something else before."""
    payload = torch.full((codec.payload_bytes(values.numel()),), 255 if dirty else 0, dtype=torch.uint8)
    codec.encode(values, payload)
    out = torch.full_like(values, math.nan)
    codec.decode(payload, out)
    return out


def sample(numel: int, seed: int, spread: float = 1.0) -> Tensor:
    """Values of many magnitudes, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=g) * torch.exp(spread * torch.randn(numel, generator=g))
    return values * (torch.rand(numel, generator=g) > 0.05)


def bound(method: str, values: Tensor) -> Tensor:
    """How far off each value may be."""
    if method in ("none", "bf16"):
        return values.abs() * (2.0**-8 if method == "bf16" else 0.0)
    block, top = {"int8": (256, 127), "int4": (64, 7), "int2": (256, 1)}[method]
    padded = torch.nn.functional.pad(values.double().abs(), (0, -values.numel() % block)).view(-1, block)
    if top == 1:  # what is above the scale becomes the scale
        scale = torch.maximum(1.534 * padded.mean(1, keepdim=True), padded.amax(1, keepdim=True) / 4)
        off = torch.maximum(padded - scale, scale / 2) + scale * 2.0**-7 + 2.0**-127
        return off.reshape(-1)[: values.numel()]
    # Half a step; a scale in bfloat16 is off by 2**-8 of itself at most.
    half = padded.amax(1, keepdim=True) / top * (0.5 + 2.0**-7) + 2.0**-127
    return half.expand_as(padded).reshape(-1)[: values.numel()]


@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("method", [m for m in EVERY if m != "topk"])
def test_values_come_back_within_the_bound(method: str, numel: int) -> None:
    values = sample(numel, numel)
    back = through(make_codec(method), values)
    assert ((back.double() - values.double()).abs() <= bound(method, values)).all()
    assert (back[values == 0] == 0).all()


@examples(60)
@given(
    method=st.sampled_from([m for m in EVERY if m != "topk"]),
    numel=st.integers(1, 700),
    exponent=st.integers(-150, 120),
    seed=st.integers(0, 2**31),
)
def test_every_magnitude_comes_back_within_the_bound(method: str, numel: int, exponent: int, seed: int) -> None:
    values = sample(numel, seed).clamp(-64, 64) * 2.0 ** (exponent / 2) * 2.0 ** (exponent / 2)
    back = through(make_codec(method), values)
    assert ((back.double() - values.double()).abs() <= bound(method, values) + 2.0**-133).all()


@examples(60)
@given(
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([64, 256, 1024]),
    numel=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["many", "zero", "tiny", "huge", "ties", "inf", "nan"]),
)
def test_the_compiled_codec_and_torch_agree(bits: int, block: int, numel: int, seed: int, kind: str) -> None:
    if library() is None:
        pytest.skip("the package was built without a C compiler")
    values = sample(numel, seed)
    if kind in ("inf", "nan"):
        values[seed % numel] = math.inf if kind == "inf" else math.nan
    values = {"zero": values * 0, "tiny": values * 2.0**-130, "huge": values.clamp(-64, 64) * 2.0**121}.get(
        kind, values
    )
    if kind == "ties":
        values = (values * 4).round().clamp(-7, 7) / 4
    ours, torchs = Blockwise(bits, block), Blockwise(bits, block, compiled=False)
    payloads = [torch.zeros(ours.payload_bytes(numel), dtype=torch.uint8) for _ in range(2)]
    ours.encode(values, payloads[0])
    torchs.encode(values, payloads[1])
    if torch.isfinite(values).all() and bits != 2:
        assert torch.equal(*payloads)
    for payload in payloads:  # either understands the other, to the bit
        backs = [torch.empty(numel) for _ in range(2)]
        ours.decode(payload, backs[0])
        torchs.decode(payload, backs[1])
        assert torch.equal(*(back.nan_to_num(7.0, 8.0, 9.0) for back in backs))
    if torch.isfinite(values).all():  # a mean is summed in another order: a scale may be a rounding away
        largest = float(backs[0].abs().max())
        one, two = torch.empty(numel), torch.empty(numel)
        ours.decode(payloads[0], one)
        ours.decode(payloads[1], two)
        apart = ((one - two).abs() > largest * 2.0**-7).double().mean()
        assert apart <= 0.01


def test_three_levels_lose_least_of_normal_values() -> None:
    """A fifth of the energy, and no other scale does better."""
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))

    def lost(back: Tensor) -> float:
        return float((values - back).square().mean())

    ours = lost(through(make_codec("int2"), values))
    others = [lost((values / scale).round().clamp(-1, 1) * scale) for scale in (0.8, 1.0, 1.1, 1.35, 1.5, 2.0)]
    assert ours == pytest.approx(0.19, abs=0.005)
    assert ours < min(others)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_every_value_come_back_exactly(bits: int) -> None:
    """Multiples of a scale that is a power of two, all of them, at every place of a block."""
    top = 2 ** (bits - 1) - 1
    codec = Blockwise(bits, 64)
    for turn in range(64):
        values = torch.arange(64).add(turn).remainder(2 * top + 1).sub(top).float() * 0.25
        values[turn] = 0.25 * top
        assert torch.equal(through(codec, values), values)


@pytest.mark.parametrize("numel", [1, 300, 5000])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("method", EVERY)
def test_what_is_not_finite_stays_visible(method: str, bad: float, numel: int) -> None:
    for place in (0, numel // 2, numel - 1):
        values = sample(numel, 5)
        values[place] = bad
        back = through(make_codec(method), values)
        assert not math.isfinite(back[place])
        assert not torch.isfinite(back.sum())
        assert not torch.isfinite(back + 1).all()


@pytest.mark.parametrize("method", EVERY)
def test_all_zeros_come_back_as_zeros(method: str) -> None:
    assert torch.equal(through(make_codec(method), torch.zeros(1000)), torch.zeros(1000))


@pytest.mark.parametrize("method", EVERY)
def test_the_payload_depends_on_the_values_only(method: str) -> None:
    values = sample(100_000, 3)
    codec = make_codec(method)
    one, other = (torch.zeros(codec.payload_bytes(values.numel()), dtype=torch.uint8) for _ in range(2))
    codec.encode(values, one)
    codec.encode(values.clone(), other)
    assert torch.equal(one, other)


@pytest.mark.parametrize("numel", LENGTHS)
@pytest.mark.parametrize("method", EVERY)
def test_payloads_can_lie_behind_each_other(method: str, numel: int) -> None:
    codec = make_codec(method)
    size = codec.payload_bytes(numel)
    assert size % 16 == 0
    whole = torch.zeros(16 + 2 * size, dtype=torch.uint8)
    values = sample(numel, 1)
    back = torch.empty(2, numel)
    for i in range(2):
        codec.encode(values * (i + 1), whole[16 + i * size : 16 + (i + 1) * size])
    for i in range(2):
        codec.decode(whole[16 + i * size : 16 + (i + 1) * size], back[i])
        assert torch.equal(back[i], through(codec, values * (i + 1)))


def test_bytes_a_value() -> None:
    found = {m: make_codec(m, density=0.01).payload_bytes(1 << 20) / (1 << 20) for m in EVERY}
    assert found == pytest.approx(
        {"none": 4, "bf16": 2, "int8": 1 + 2 / 256, "int4": 0.5 + 2 / 64, "int2": 0.25 + 2 / 256, "topk": 0.04},
        rel=2e-3,
    )


# Top-k.


def oracle(values: Tensor, count: int) -> list[int]:
    """The places of the largest magnitudes; of equal ones the first."""
    sizes = [math.inf if math.isnan(v) else abs(v) for v in values.tolist()]
    return sorted(sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[:count])


@examples(120)
@given(
    numel=st.integers(1, 3000),
    share=st.floats(0.0005, 1.0),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["many", "ties", "few", "none", "equal", "bad"]),
)
def test_topk_sends_the_largest(numel: int, share: float, seed: int, kind: str) -> None:
    values = sample(numel, seed, 2.0)
    if kind == "ties":
        values = values.sign() * values.abs().log2().round().exp2().nan_to_num(0.0)
    elif kind == "few":
        values[: numel - numel // 50] = 0
    elif kind == "none":
        values.zero_()
    elif kind == "equal":
        values.fill_(-3.0)
    elif kind == "bad":
        values[::7] = math.nan
        values[3::11] = math.inf
    codec = TopK(share)
    count = codec.count(numel)
    assert count == min(numel, math.ceil(share * numel))
    places = oracle(values, count)
    assert largest(values, count).tolist() == places
    expected = torch.zeros(numel)
    expected[places] = values[places].bfloat16().float()
    assert torch.equal(through(codec, values).nan_to_num(7.5), expected.nan_to_num(7.5))


@pytest.mark.parametrize("numel", [65_535, 65_536, 65_537, 500_000, 1_048_577])
@pytest.mark.parametrize("kind", ["plain", "columns", "one row", "sorted"])
def test_topk_of_long_tensors_is_exact(numel: int, kind: str) -> None:
    """Also where a sample at regular places would see the wrong values."""
    values = sample(numel, numel, 0.5)
    if kind == "columns":
        values *= torch.logspace(-6, 0, 64).repeat(numel // 64 + 1)[:numel]
    elif kind == "one row":
        values[:-700] = 0
    elif kind == "sorted":
        values = values.sort().values
    count = math.ceil(0.003 * numel)
    found = largest(values, count)
    assert found.numel() == count
    assert (found.diff() > 0).all()
    assert torch.equal(values[found].abs().sort().values, values.abs().topk(count).values.sort().values)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_must_be_a_share(density: float) -> None:
    with pytest.raises(SpecError, match="share of the values"):
        make_codec("topk", density=density)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(SpecError, match="did you mean 'int8'"):
        make_codec("int9")
