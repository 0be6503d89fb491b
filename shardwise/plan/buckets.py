"""How large gradient buckets should be, and how long a step waits for them: arithmetic on measured times. No torch."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.spec.cluster import TRANSPORTS, Link
from shardwise.spec.collective_cost import seconds

Seconds = Callable[[int], float]  # of an all-reduce of so many bytes

SMALLEST, ROUND = 1 << 16, 100_000  # bytes
MOST = 512  # buckets


def choose_bucket_bytes(gradient_bytes: int, all_reduce_s: Seconds, work_s: Seconds) -> int:
    """The size of buckets that costs a step least, from what an all-reduce takes and what it takes from computing.

    k buckets of s bytes, k s = all gradients. The last one leaves when backward has ended, so all of its
    `all_reduce_s(s)` is exposed. Each of the k - 1 before it travels behind backward and costs `work_s(s)` of
    computing, and on a link that is never idle one latency, `all_reduce_s(0)`. The sum is minimised: few and large
    buckets where the ranks' own cores move the bytes, for there hiding saves little and each message has its price;
    small ones where something else does (a GPU, a slow network), so that the first leaves early and the last is short:
    there s comes near sqrt(gradient bytes x bandwidth x latency). The minimum is flat: twice or half costs little.
    Tensors are not cut; an eighth on top keeps what they leave over from becoming a bucket of its own.
    """

    def cost(count: int) -> float:
        size = -(-gradient_bytes // count)
        return (count - 1) * (work_s(size) + all_reduce_s(0)) + all_reduce_s(size)

    best = min(range(1, max(1, min(MOST, gradient_bytes // SMALLEST)) + 1), key=cost)
    return max(1, -(-gradient_bytes * 9 // (8 * best * ROUND))) * ROUND


def usual_bucket_bytes(gradient_bytes: int, ranks: int, backend: str) -> int:
    """`choose_bucket_bytes` by what `backend` usually reaches (gloo's, where it is not known): alike on all ranks."""
    known = TRANSPORTS.get(backend, TRANSPORTS["gloo"])
    return choose_bucket_bytes(gradient_bytes, ring_seconds(ranks, known.link), known.work_s)


def exposed_s(gradient_bytes: int, bucket_bytes: int, backward_s: float, all_reduce_s: Seconds) -> float:
    """Seconds that a step waits for its buckets after a backward pass of `backward_s`, in which they leave evenly.

    They travel one after the other: bucket i of k leaves at i / k of the backward pass or after the one before. Either
    only the last one is exposed, or the link is busy from the first one on (Li et al. 2020, section 3.2.3).
    """
    count = max(1, -(-gradient_bytes // bucket_bytes))
    each = all_reduce_s(-(-gradient_bytes // count))
    return max(each, count * each - backward_s * (count - 1) / count)


def ring_seconds(ranks: int, link: Link) -> Seconds:
    """Seconds of a ring all-reduce by its bytes: what gloo and nccl do with large ones (Thakur et al. 2005, 3.4)."""
    return lambda nbytes: seconds("all_reduce", "ring", nbytes, ranks, link, segments=1)
