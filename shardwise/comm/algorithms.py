"""Collective algorithms as data: for each rank, in which round which pieces go to whom and come from whom. No torch.

```
ring, 3 ranks, reduce-scatter then all-gather      halving_doubling, 4 ranks      tree, up then down
   0 --> 1 --> 2 --+  a piece on each arrow,          0 <-> 2   1 <-> 3             half A: 1 -> 2 <- 3 -> 4 ...
   ^               |  summed on its way, then         halves, then quarters,        half B: the same, a rank further:
   +---------------+  handed round                    and back again                who is inner in A is a leaf in B
```

A tensor is cut into equal pieces. In a round a rank sends some and receives some; what it receives is added or copied.
What arrives in one round is added in the order of ranks, this rank's own piece among them. A piece is summed in one
place and then handed on (in `flat` everywhere, in the same order), so all ranks get the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from shardwise.errors import SpecError


class Message(NamedTuple):
    """Pieces `first` to `last` (exclusive) to or from `peer`; `add` says what a receiver does with them."""

    peer: int
    first: int
    last: int
    add: bool = False


class Step(NamedTuple):
    """What one rank does in one round; both ends of a message have it in the same round."""

    round: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


class Schedule(NamedTuple):
    """The steps of one rank, on a tensor cut into `pieces`."""

    pieces: int
    steps: tuple[Step, ...]


class Hop(NamedTuple):
    """A message as seen from above."""

    round: int
    source: int
    target: int
    first: int
    last: int
    add: bool = False


def schedule(collective: str, algorithm: str, rank: int, size: int, root: int = 0) -> Schedule:
    """What `rank` of `size` ranks does. `root` is where broadcast begins and reduce ends.

    The tensor holds as many elements on every rank. After reduce_scatter rank r has the sum of piece r of `size` (its
    others are partial sums), before all_gather its own. Raises SpecError for a pair that there is not.
    """
    return _all(collective, algorithm, size, root)[rank]


@functools.lru_cache(maxsize=256)
def _all(collective: str, algorithm: str, size: int, root: int) -> tuple[Schedule, ...]:
    made = _HOPS.get((collective, algorithm))
    if made is None:
        known = ", ".join(a for c, a in _HOPS if c == collective) or ", ".join(sorted({c for c, _ in _HOPS}))
        raise SpecError(f"there is no {collective} by '{algorithm}'; there is {known}.")
    pieces, hops = made(size) if collective not in ("broadcast", "reduce") else _rooted(made(size), size, root)
    sends: list[dict[int, list[Message]]] = [{} for _ in range(size)]
    receives: list[dict[int, list[Message]]] = [{} for _ in range(size)]
    for at, source, target, first, last, add in hops:
        sends[source].setdefault(at, []).append(Message(target, first, last, add))
        receives[target].setdefault(at, []).append(Message(source, first, last, add))
    return tuple(Schedule(pieces, _steps(sends[rank], receives[rank])) for rank in range(size))


def _steps(sends: Mapping[int, list[Message]], receives: Mapping[int, list[Message]]) -> tuple[Step, ...]:
    rounds = sorted({*sends, *receives})
    return tuple(Step(at, tuple(sends.get(at, ())), tuple(sorted(receives.get(at, ())))) for at in rounds)


Hops = tuple[int, list[Hop]]  # the number of pieces, and the messages between all ranks


def _rooted(hops: Hops, size: int, root: int) -> Hops:
    """Of an algorithm whose root is rank 0: the same with another one."""
    return hops[0], [h._replace(source=(h.source + root) % size, target=(h.target + root) % size) for h in hops[1]]


def _then(one: Hops, other: Hops) -> Hops:
    """One after the other, on the same pieces."""
    after = 1 + max((hop.round for hop in one[1]), default=-1)
    return one[0], one[1] + [hop._replace(round=hop.round + after) for hop in other[1]]


def _backwards(hops: Hops, *, add: bool) -> Hops:
    """Every message the other way, the last one first: a broadcast becomes a reduce, an all-gather a reduce-scatter."""
    last = max((hop.round for hop in hops[1]), default=0)
    return hops[0], [Hop(last - h.round, h.target, h.source, h.first, h.last, add) for h in reversed(hops[1])]


def _ring_gather(size: int) -> Hops:
    turns = range(size - 1)
    return size, [Hop(t, r, (r + 1) % size, (r - t) % size, (r - t) % size + 1) for t in turns for r in range(size)]


def _ring_scatter(size: int) -> Hops:
    return _backwards(_ring_gather(size), add=True)


def _chain(size: int) -> Hops:
    return 1, [Hop(r, r, r + 1, 0, 1) for r in range(size - 1)]


def _flat_gather(size: int) -> Hops:
    return size, [Hop(0, r, (r + k) % size, r, r + 1) for k in range(1, size) for r in range(size)]


def _flat_scatter(size: int) -> Hops:
    return _backwards(_flat_gather(size), add=True)


def _flat_broadcast(size: int) -> Hops:
    return 1, [Hop(0, 0, r, 0, 1) for r in range(1, size)]


def _flat_sum(size: int) -> Hops:
    return 1, [Hop(0, r, (r + k) % size, 0, 1, True) for k in range(1, size) for r in range(size)]


class _Folded(NamedTuple):
    """The ranks as a power of two of them, the last of which stand for two: what halving and doubling work on."""

    power: int
    ranks: tuple[int, ...]  # of each: the rank that acts
    extras: tuple[tuple[int, int], ...]  # (the rank that acts, the one that it stands for)
    cuts: tuple[int, ...]  # where the pieces of each begin, when every rank has one


def _fold(size: int) -> _Folded:
    power = 1 << (size.bit_length() - 1)
    single = 2 * power - size
    ranks = tuple(v if v < single else 2 * v - single for v in range(power))
    extras = tuple((r, r + 1) for r in ranks[single:])
    return _Folded(power, ranks, extras, (*ranks, size))


def _doubling(folded: _Folded, cuts: tuple[int, ...]) -> list[Hop]:
    """Blocks of 1, 2, 4 ... neighbours are exchanged, until everybody has all."""
    hops: list[Hop] = []
    reach = 1
    while reach < folded.power:
        at = reach.bit_length() - 1
        for v in range(folded.power):
            block = v // reach * reach
            peer = folded.ranks[v ^ reach]
            hops.append(Hop(at, folded.ranks[v], peer, cuts[block], cuts[block + reach]))
        reach *= 2
    return hops


def _doubling_gather(size: int) -> Hops:
    """Thakur et al. 2005, section 3.1, recursive doubling."""
    folded = _fold(size)
    given = (size, [Hop(0, extra, rank, extra, extra + 1) for rank, extra in folded.extras])
    return _then(_then(given, (size, _doubling(folded, folded.cuts))), (size, _told(folded, size)))


def _told(folded: _Folded, pieces: int) -> list[Hop]:
    return [Hop(0, rank, extra, 0, pieces) for rank, extra in folded.extras]


def _halving_scatter(size: int) -> Hops:
    """Thakur et al. 2005, section 3.3, recursive halving."""
    pieces, hops = _backwards(_doubling_gather(size), add=True)
    if not size & (size - 1):
        return pieces, hops
    last = max(hop.round for hop in hops)  # there a folded rank is told its piece, which holds its own share already
    return pieces, [hop._replace(add=hop.round < last) for hop in hops]


def _halving_sum(size: int) -> Hops:
    """Rabenseifner 2004: reduce-scatter by halving, all-gather by doubling; a piece for each rank that acts."""
    folded = _fold(size)
    gather = folded.power, _doubling(folded, tuple(range(folded.power + 1)))
    told = folded.power, _told(folded, folded.power)
    halves = _then(_backwards(told, add=True), _backwards(gather, add=True))
    return _then(halves, _then(gather, told))


def _scatter_gather_broadcast(size: int) -> Hops:
    """Thakur et al. 2005, section 3.2 (van de Geijn): halves down a binomial tree, then doubling."""
    folded = _fold(size)
    q = folded.power
    hops: list[Hop] = []
    reach, at = q // 2, 0
    while reach:
        for v in range(0, q, 2 * reach):
            hops.append(Hop(at, folded.ranks[v], folded.ranks[v + reach], v + reach, v + 2 * reach))
        reach, at = reach // 2, at + 1
    gather = q, _doubling(folded, tuple(range(q + 1)))
    return _then((q, hops), _then(gather, (q, _told(folded, q))))


def _edges(size: int) -> list[tuple[int, int, int]]:
    """(parent, child, height of the parent) of an in-order binary tree over 1 .. `size`; odd numbers are its leaves."""
    found = []
    for node in range(2, size + 1, 2):
        height = (node & -node).bit_length() - 1
        found.append((node, node - (1 << height - 1), height))
        beyond = min(size - node, (1 << height) - 1)
        if beyond:
            found.append((node, node + (1 << beyond.bit_length() - 1), height))
    return found


def _two_trees(size: int, below: int, *, first: int = 0) -> list[Hop]:
    """Half 0 down one tree over ranks `first` .. `first` + `size` - 1, half 1 down the other, from round `below` on."""
    top = size.bit_length() - 1
    hops = []
    for half in (0, 1):
        for parent, child, height in _edges(size):
            source, target = ((number - 1 - half) % size + first for number in (parent, child))
            hops.append(Hop(below + top - height, source, target, half, half + 1))
    return hops


def _tree_sum(size: int) -> Hops:
    """Sanders et al. 2009; a piece goes up when its rank has its children's, and comes down from the root."""
    hops = []
    for half in (0, 1):
        for parent, child, _ in _edges(size):
            height = (child & -child).bit_length() - 1
            source, target = ((number - 1 - half) % size for number in (child, parent))
            hops.append(Hop(height, source, target, half, half + 1, True))
    return 2, hops + _two_trees(size, size.bit_length() - 1)


def _tree_broadcast(size: int) -> Hops:
    """Rank 0 stands outside and feeds the roots of both trees over the others."""
    others = size - 1
    if not others:
        return 2, []
    root = 1 << (others.bit_length() - 1)
    fed = [Hop(0, 0, (root - 1 - half) % others + 1, half, half + 1) for half in (0, 1)]
    return 2, fed + _two_trees(others, 1, first=1)


def _tree_reduce(size: int) -> Hops:
    """The broadcast backwards, but a child sends as soon as it has its own children's."""
    top = 0 if size < 2 else (size - 1).bit_length() - 1
    pieces, hops = _tree_broadcast(size)
    height = {(half, target): 0 for _, _, target, half, _, _ in hops}
    for at, source, _, half, _, _ in hops:
        if source:
            height[half, source] = top + 1 - at
    return pieces, [Hop(height[h, t], t, s, h, h + 1, True) for _, s, t, h, _, _ in hops]


def _reduce(broadcast: Callable[[int], Hops]) -> Callable[[int], Hops]:
    return lambda size: _backwards(broadcast(size), add=True)


def _both(scatter: Callable[[int], Hops], gather: Callable[[int], Hops]) -> Callable[[int], Hops]:
    return lambda size: _then(scatter(size), gather(size))


def _halving_reduce(size: int) -> Hops:
    """Rabenseifner 2004: reduce-scatter by halving, then the pieces up a binomial tree to the root."""
    pieces, hops = _backwards(_scatter_gather_broadcast(size), add=True)
    folded = 1 if size & (size - 1) else 0
    sums = folded + size.bit_length() - 1
    return pieces, [hop._replace(add=hop.round < sums) for hop in hops]


_HOPS: dict[tuple[str, str], Callable[[int], Hops]] = {
    ("all_reduce", "flat"): _flat_sum,
    ("all_reduce", "two_shot"): _both(_flat_scatter, _flat_gather),
    ("all_reduce", "halving_doubling"): _halving_sum,
    ("all_reduce", "tree"): _tree_sum,
    ("all_reduce", "ring"): _both(_ring_scatter, _ring_gather),
    ("broadcast", "flat"): _flat_broadcast,
    ("broadcast", "halving_doubling"): _scatter_gather_broadcast,
    ("broadcast", "tree"): _tree_broadcast,
    ("broadcast", "ring"): _chain,
    ("reduce", "flat"): _reduce(_flat_broadcast),
    ("reduce", "halving_doubling"): _halving_reduce,
    ("reduce", "tree"): _tree_reduce,
    ("reduce", "ring"): _reduce(_chain),
    ("all_gather", "flat"): _flat_gather,
    ("all_gather", "halving_doubling"): _doubling_gather,
    ("all_gather", "ring"): _ring_gather,
    ("reduce_scatter", "flat"): _flat_scatter,
    ("reduce_scatter", "halving_doubling"): _halving_scatter,
    ("reduce_scatter", "ring"): _ring_scatter,
}
