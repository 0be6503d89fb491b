"""Top-k: the few values of largest magnitude and where they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardwise.comm.codec import aligned
from shardwise.errors import SpecError

WINDOW = 1 << 16  # an index is sent as its 16 low bits, and how many indices lie in each window of 65,536
SAMPLE = 1 << 14
ROWS = 16
LEAST = 2.0**-149  # the smallest magnitude that is not zero


class TopK:
    """The `ceil(density * numel)` values of largest magnitude in bfloat16, the others as zeros; 4 bytes a value sent.

    Aji and Heafield 2017, "Sparse communication for distributed gradient descent". Of equal magnitudes those with the
    lower index are sent (on the CPU); what is not finite counts as largest. Raises SpecError for a density outside
    (0, 1].
    """

    def __init__(self, density: float) -> None:
        if not 0 < density <= 1:
            raise SpecError(
                f"density={density:g} of top-k: it is the share of the values that is sent, above 0 and at most 1."
            )
        self._density = density

    def count(self, numel: int) -> int:
        """How many of `numel` values are sent."""
        return min(numel, math.ceil(self._density * numel))

    def payload_bytes(self, numel: int) -> int:
        return aligned(4 * -(-numel // WINDOW)) + aligned(4 * self.count(numel))

    def encode(self, values: Tensor, out: Tensor) -> None:
        if not values.numel():
            return
        windows, low, kept = self._sections(values.numel(), out)
        chosen = largest(values, self.count(values.numel()))
        windows.copy_(torch.bincount(chosen >> 16, minlength=windows.numel()))
        low.copy_(chosen & (WINDOW - 1))
        kept.copy_(values[chosen])

    def decode(self, payload: Tensor, out: Tensor) -> None:
        windows, low, kept = self._sections(out.numel(), payload)
        first = torch.arange(0, out.numel(), WINDOW, device=out.device)
        chosen = first.repeat_interleave(windows.long(), output_size=kept.numel()) + low.long().bitwise_and_(WINDOW - 1)
        out.zero_().index_copy_(0, chosen, kept.float())

    def _sections(self, numel: int, payload: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int32 [windows], int16 [count] and bfloat16 [count] inside the payload."""
        windows, count = -(-numel // WINDOW), self.count(numel)
        rest = payload[aligned(4 * windows) :]
        return (
            payload[: 4 * windows].view(torch.int32),
            rest[: 2 * count].view(torch.int16),
            rest[2 * count : 4 * count].view(torch.bfloat16),
        )


def largest(values: Tensor, count: int) -> Tensor:
    """The indices (int64, ascending) of the `count` values of largest magnitude, NaN and infinity first."""
    if count == values.numel():
        return torch.arange(count, device=values.device)
    if values.device.type != "cpu":
        return values.abs().topk(count).indices.sort().values
    bound = _reached_by_somewhat_more(values, count)
    candidates = _reaching(values, bound)
    if candidates.numel() < count:
        if bound == LEAST:
            return _filled_with_zeros(candidates, count)
        candidates = torch.arange(values.numel())
    sizes = _sizes(values[candidates])
    last = sizes.kthvalue(sizes.numel() - count + 1).values
    above, equal = sizes > last, sizes == last
    equal &= equal.cumsum(0) <= count - above.sum()
    return candidates[above | equal]


def _sizes(values: Tensor) -> Tensor:
    return values.abs().nan_to_num_(nan=math.inf, posinf=math.inf)


def _reached_by_somewhat_more(values: Tensor, count: int) -> float:
    """A magnitude that about 1 to 2 x `count` values reach, judged by a sample; ranking all of them takes long."""
    stride = values.numel() // SAMPLE | 1  # odd, or a sample of a matrix would see some of its columns only
    sample = _sizes(values[::stride])
    expected = count / stride
    rank = min(sample.numel(), math.ceil(expected + 4 * math.sqrt(expected) + 4))
    return max(LEAST, float(sample.topk(rank, sorted=False).values.min()))


def _reaching(values: Tensor, bound: float) -> Tensor:
    """The indices, ascending, of all values of at least that magnitude.

    In a table of 16 rows most columns have none, which two reductions show faster than a search of the whole.
    """
    table = values[: values.numel() // ROWS * ROWS].view(ROWS, -1)
    width = table.shape[1]
    low, high = table.amin(0), table.amax(0)
    columns = _outside(low, high, bound).nonzero().squeeze(1)
    few = table[:, columns]
    row, place = _outside(few, few, bound).nonzero(as_tuple=True)
    rest = torch.arange(ROWS * width, values.numel())
    return torch.cat([row * width + columns[place], rest[_outside(values[rest], values[rest], bound)]])


def _outside(low: Tensor, high: Tensor, bound: float) -> Tensor:
    """True also for NaN."""
    return ((low > -bound) & (high < bound)).logical_not_()


def _filled_with_zeros(chosen: Tensor, count: int) -> Tensor:
    """All values besides `chosen` are zeros: the first of them make up the number."""
    others = torch.ones(count + chosen.numel(), dtype=torch.bool)
    others[chosen[chosen < others.numel()]] = False
    return torch.cat([chosen, others.nonzero().squeeze(1)[: count - chosen.numel()]]).sort().values
