"""Numbers in fewer bits between two updates: bfloat16 rounded by chance, and 8 bits with a scale for every 256.

The 8-bit format is the dynamic one of Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization, sections 2.1
and 2.2): each block of 256 values is divided by its largest magnitude, and each quotient becomes the nearest of 256
codes, which lie densest near zero: seven decades, the coarser the decade the fewer codes. What comes back differs from
what went in by at most `ERROR` times the largest magnitude of its block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7
# Half of the widest gap between codes, and what the quotient loses as it is rounded to bfloat16 to be looked up.
ERROR = {True: 0.9 / 2 ** (DECADES - 1) / 2 + 2.0**-9, False: 0.9 / 2**DECADES / 2 + 2.0**-9}
# What torch's optimizers keep that is never negative: it has all codes for itself.
UNSIGNED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "sum"})


@functools.cache
def codes_of(signed: bool) -> Tensor:
    """The 256 values that a code stands for, ascending, from -1 or 0 to 1."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - DECADES + 1)
        found += means.tolist()
        found += (-means).tolist() if signed else []
    return torch.tensor(sorted(found), dtype=torch.float64).float()


@functools.cache
def _nearest(signed: bool) -> Tensor:
    """The code nearest to each number that 16 bits of bfloat16 can hold, by those bits.

    What is above zero never becomes zero where values are unsigned: one divides by their root.
    """
    codes = codes_of(signed)
    every = torch.arange(65536, dtype=torch.int32).sub_(32768).to(torch.int16).view(torch.bfloat16).float()
    found = torch.bucketize(every.nan_to_num_().clamp_(-1, 1), (codes[1:] + codes[:-1]) / 2)
    if not signed:
        found[every > 0] = found[every > 0].clamp_(min=1)
    return found.to(torch.uint8)


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Flat float32 values [n] -> codes uint8 [n] and scales float32 [ceil(n / 256)].

    A scale has the sign of the value of largest magnitude, which comes back as it was; so what has come back is
    quantized to the same codes and scales again.
    """
    blocks = _in_blocks(values.float())
    least, most = blocks.aminmax(dim=1)
    scales = torch.where(-least > most, least, most)
    quotients = blocks / torch.where(scales != 0, scales, 1.0)[:, None]
    places = quotients.to(torch.bfloat16).view(torch.int16).flatten().int().add_(32768)
    return torch.index_select(_nearest(signed).to(values.device), 0, places)[: values.numel()], scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The inverse of `quantize`, but for its error."""
    values = torch.index_select(codes_of(signed).to(codes.device), 0, codes.int())
    return _in_blocks(values).mul_(scales[:, None]).flatten()[: codes.numel()]


def round_by_chance(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with the odds that keep the mean (Gupta et al. 2015, section 3).

    What is not finite stays so.
    """
    noise = torch.randint(0, 65536, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits = values.float().contiguous().view(torch.int32)
    rounded = bits.add(noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _in_blocks(values: Tensor) -> Tensor:
    """[n] -> [ceil(n / 256), 256], with zeros at the end."""
    missing = -values.numel() % BLOCK
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.view(-1, BLOCK)
