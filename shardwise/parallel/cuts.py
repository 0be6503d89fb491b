"""Which gradients share a flat bucket: pure arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def cut(sizes_bytes: Sequence[int], kinds: Sequence[Hashable], limit_bytes: int) -> list[list[int]]:
    """Indices into `sizes_bytes` as buckets, in the order in which they fill; every index is in one of them.

    A bucket holds one kind (dtype and device) and closes before it would exceed `limit_bytes`; a larger tensor has a
    bucket of its own. Buckets are listed by their last index: the one that is complete first comes first.
    """
    done: list[list[int]] = []
    open_buckets: dict[Hashable, tuple[int, list[int]]] = {}
    for index, (size, kind) in enumerate(zip(sizes_bytes, kinds, strict=True)):
        held, members = open_buckets.get(kind, (0, []))
        if members and held + size > limit_bytes:
            done.append(members)
            held, members = 0, []
        open_buckets[kind] = (held + size, [*members, index])
    done.extend(members for _, members in open_buckets.values())
    return sorted(done, key=lambda members: members[-1])
