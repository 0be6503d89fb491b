"""Replicas that meet by the compiled kernel do what torch's arithmetic does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shardwise.comm.codec import Blockwise
from shardwise.comm.kernel import library
from shardwise.comm.one_pass import one_pass
from tests.examples import examples

pytestmark = pytest.mark.skipif(library() is None, reason="built without a C compiler")


def shapes(numel: int, cuts: list[float], generator: torch.Generator) -> list[Tensor]:
    """`numel` values in tensors that lie apart, some of them empty."""
    ends = sorted(int(cut * numel) for cut in cuts)
    return [
        torch.randn(end - begin, generator=generator) for begin, end in zip([0, *ends], [*ends, numel], strict=True)
    ]


@examples(80)
@given(
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([64, 256, 1024]),
    numel=st.integers(1, 5000),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    ranks=st.integers(1, 4),
    rate=st.sampled_from([1.0, 0.7]),
    momentum=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_and_torch_agree(
    bits: int, block: int, numel: int, cuts: list[float], ranks: int, rate: float, momentum: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    rank = seed % ranks
    codec, by_torch = Blockwise(bits, block), Blockwise(bits, block, compiled=False)
    parts = shapes(numel, cuts, g)
    kernel = one_pass(codec, parts)
    assert kernel is not None
    meeting = torch.randn(numel, generator=g)
    velocity = torch.randn(numel, generator=g) if momentum else None

    received = torch.zeros(ranks, codec.payload_bytes(numel), dtype=torch.uint8)
    for r in range(ranks):
        codec.encode(torch.randn(numel, generator=g), received[r])
    kernel.tell(meeting, received[rank])
    expected = torch.zeros_like(received[rank])
    codec.encode(meeting - torch.cat(parts), expected)
    assert torch.equal(received[rank], expected)

    said = [torch.empty(numel) for _ in range(ranks)]
    for r in range(ranks):
        by_torch.decode(received[r], said[r])
    gradient = said[0].clone()
    for each in said[1:]:
        gradient.add_(each)
    gradient.div_(ranks)
    if velocity is not None:
        expected_velocity = velocity.mul(momentum).add_(gradient)
        gradient = gradient + momentum * expected_velocity
    moved = gradient * rate
    there, here = meeting - moved, torch.cat(parts) + (said[rank] - moved)
    kernel.follow(meeting, velocity, received, rank, rate=rate, momentum=momentum)
    if velocity is not None:
        torch.testing.assert_close(velocity, expected_velocity, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(meeting, there, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat(parts), here, rtol=1e-6, atol=1e-6)
        return
    assert torch.equal(meeting, there)
    assert torch.equal(torch.cat(parts), here)


def test_what_the_kernel_does_not_take_is_left_to_torch() -> None:
    parameter = nn.Parameter(torch.zeros(4, 6))
    assert one_pass(Blockwise(4, 64), [parameter]) is not None
    assert one_pass(Blockwise(4, 64, compiled=False), [parameter]) is None
    assert one_pass(None, [parameter]) is None
    assert one_pass(Blockwise(4, 64), [parameter, parameter.detach().T]) is None
    assert one_pass(Blockwise(4, 64), [parameter.detach().double()]) is None
