"""What a collective costs: (bytes, ranks, links) -> seconds, for every algorithm, and which one is cheapest.

The model is LogGP's (Alexandrov et al. 1995) with additions: a message is on its way for `latency_s`, keeps its ends
busy for `message_s`, goes through a port at `bandwidth` (a rank sends and receives at once), and adding costs `add_s` a
byte. A tensor may be cut into segments that follow each other through the rounds of an algorithm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shardwise.errors import SpecError, did_you_mean
from shardwise.spec.cluster import Link

SEGMENTS = (1, 2, 4, 8, 16, 32, 64)
NEARLY = 1.02  # fewer segments are preferred up to here: busy processors dislike many messages
ALIGNED = 64  # bytes: shares begin at multiples of it
SMALLEST_SEGMENT = 256 << 10  # bytes of a message below which cutting it further gains nothing


class Path(NamedTuple):
    """A link with what its ends spend: seconds a message, seconds for each byte added."""

    latency_s: float
    bandwidth: float
    message_s: float = 0.0
    add_s: float = 0.0

    def shared(self, by: int) -> Path:
        """The same for each of `by` ranks of a host that use it at once."""
        return self._replace(bandwidth=self.bandwidth / by, message_s=self.message_s * by)


class Shape(NamedTuple):
    """What an algorithm does, of a tensor of one byte.

    `messages`, `bytes` and `adds` are those of the busiest rank of each round, summed over the rounds: what one segment
    waits for. `busy_...` are the sums over all rounds of the rank that has most to do: what the next segment waits for.
    """

    rounds: int
    messages: float
    bytes: float
    adds: float
    busy_messages: float
    busy_bytes: float
    busy_adds: float

    def seconds(self, nbytes: float, path: Path, segments: int = 1) -> float:
        piece = nbytes / segments
        per_byte = 1 / path.bandwidth
        first = self.rounds * path.latency_s + self.messages * path.message_s
        first += piece * (self.bytes * per_byte + self.adds * path.add_s)
        port = self.busy_bytes * piece * per_byte
        processor = self.busy_messages * path.message_s + self.busy_adds * piece * path.add_s
        return first + (segments - 1) * max(port, processor)


class Choice(NamedTuple):
    """An algorithm, the segments that its tensor is cut into, and what it should take."""

    algorithm: str
    segments: int
    seconds: float


class Share(NamedTuple):
    """The part of a tensor that takes one of several paths, and how."""

    path: int
    nbytes: int
    segments: int


class Split(NamedTuple):
    """One algorithm over several paths at once."""

    algorithm: str
    shares: tuple[Share, ...]
    seconds: float


class Topology(NamedTuple):
    """Ranks on hosts: how many on each, the path between two of a host, the paths between two hosts."""

    hosts: tuple[int, ...]
    inside: Path
    between: tuple[Path, ...]


class Form(NamedTuple):
    """How a collective goes through a topology.

    `columns`: every rank of a host exchanges a piece of its own with other hosts. `leader`: one rank of each host
    exchanges everything. `straight`: hosts make no difference.
    """

    form: str
    between: Split
    seconds: float


def _plain(rounds: int, messages: float, moved: float, adds: float) -> Shape:
    """Of an algorithm that keeps the same rank busiest in every round."""
    return Shape(rounds, messages, moved, adds, messages, moved, adds)


def _ring(collective: str, p: int) -> Shape:
    """Thakur et al. 2005, sections 3.4 and 4; broadcast and reduce are a chain, from one rank to the next."""
    if collective in ("broadcast", "reduce"):
        adds = float(collective == "reduce")
        return Shape(p - 1, p - 1, p - 1, (p - 1) * adds, 1, 1, adds)
    turns = 2 if collective == "all_reduce" else 1
    adds = 0.0 if collective == "all_gather" else (p - 1) / p
    return _plain(turns * (p - 1), turns * (p - 1), turns * (p - 1) / p, adds)


def _flat(collective: str, p: int) -> Shape:
    """Everybody sends to everybody, or the root to everybody, in one round."""
    moved = (p - 1) / p if collective in ("all_gather", "reduce_scatter") else p - 1.0
    adds = 0.0 if collective in ("all_gather", "broadcast") else moved
    return _plain(1, p - 1, moved, adds)


def _two_shot(collective: str, p: int) -> Shape:
    """Everybody sends each rank its piece, which that rank sums and sends to everybody."""
    return _plain(2, 2 * (p - 1), 2 * (p - 1) / p, (p - 1) / p)


def _halving_doubling(collective: str, p: int) -> Shape:
    """Rabenseifner 2004; Thakur et al. 2005, section 4.5; van de Geijn's broadcast. Ranks beyond a power of two fold
    into a neighbour first and are told the result."""
    q = 1 << (p.bit_length() - 1)
    k, extra = q.bit_length() - 1, p - q
    fold = int(extra > 0)
    half = (q - 1) / q
    if collective == "all_reduce":
        around = 2 * k + 2 * fold
        busy = 2 * half + fold
        return Shape(around, around, busy + fold, half + fold, 2 * k + fold, busy, half + fold)
    if collective in ("broadcast", "reduce"):
        # a rank with a folded one hands on at most (its lowest bit - 1) / q of what was scattered
        below = max((v & -v for v in range(q - extra, q)), default=1)
        busy = half + max(half, fold * (1 + (below - 1) / q))
        adds = (half + fold) if collective == "reduce" else 0.0
        return Shape(2 * k + fold, 2 * k + fold, 2 * half + fold, adds, 2 * k, busy, adds)
    blocks = sum((1 << j) + min(extra, 1 << j) for j in range(k)) / p
    moved = blocks + fold
    adds = moved if collective == "reduce_scatter" else 0.0
    return Shape(k + 2 * fold, k + 2 * fold, moved + fold / p, adds, k + fold, moved, adds)


def _tree(collective: str, p: int) -> Shape:
    """Two binary trees, each with half of the tensor; who is inner in one is a leaf of the other (Sanders et al. 2009).

    Broadcast and reduce keep the root outside, beside the roots of both trees over the others.
    """
    inside = p if collective == "all_reduce" else p - 1
    height = inside.bit_length() - 1
    up = height - (0.5 if inside < 3 << height - 1 else 0.0) if height else 0.0
    down = height - (0.5 if inside == 1 << height else 0.0) if height else 0.0
    if collective == "all_reduce":
        busy = {2: (2, 1.0, 0.5), 3: (3, 1.5, 1.0)}.get(p, (4, 2.0, 1.0))
        return Shape(2 * height, 2 * (up + down), up + down, up, *busy)
    moved = 1 + (up if collective == "reduce" else down)
    adds = moved if collective == "reduce" else 0.0
    return Shape(1 + height, 2 * moved, moved, adds, 2, 1, float(collective == "reduce"))


_SHAPES: dict[str, Callable[[str, int], Shape]] = {
    "flat": _flat,
    "halving_doubling": _halving_doubling,
    "ring": _ring,
    "tree": _tree,
    "two_shot": _two_shot,
}
# Trees have no all-gather and reduce-scatter: doubling and halving take as few rounds and move every byte once.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("flat", "two_shot", "halving_doubling", "tree", "ring"),
    "broadcast": ("flat", "halving_doubling", "tree", "ring"),
    "reduce": ("flat", "halving_doubling", "tree", "ring"),
    "all_gather": ("flat", "halving_doubling", "ring"),
    "reduce_scatter": ("flat", "halving_doubling", "ring"),
}


@functools.lru_cache(maxsize=4096)
def shape(collective: str, algorithm: str, ranks: int) -> Shape:
    """Rounds, messages, bytes and additions of an algorithm between `ranks` ranks.

    Raises SpecError for a collective or an algorithm of it that there is not.
    """
    for given, known in ((collective, tuple(ALGORITHMS)), (algorithm, ALGORITHMS.get(collective, ()))):
        if given not in known:
            raise SpecError(f"'{given}' is none of {', '.join(known)}{did_you_mean(given, list(known))}")
    return _plain(0, 0, 0.0, 0.0) if ranks == 1 else _SHAPES[algorithm](collective, ranks)


def seconds(
    collective: str, algorithm: str, nbytes: float, ranks: int, path: Path | Link, *, segments: int | None = None
) -> float:
    """Seconds that `algorithm` takes for a tensor of `nbytes`, cut into `segments` (None: the best number of them).

    `nbytes` is the whole tensor: all ranks' pieces together in all_gather and reduce_scatter.
    """
    found, wire = shape(collective, algorithm, ranks), as_path(path)
    return found.seconds(nbytes, wire, segments or _segments(found, nbytes, wire))


def choose(collective: str, nbytes: float, ranks: int, path: Path | Link, *, only: str | None = None) -> Choice:
    """The cheapest algorithm for a tensor of `nbytes`; with `only`, that one, in the best number of segments."""
    wire = as_path(path)
    found = []
    for algorithm in (only,) if only else ALGORITHMS[collective]:
        about = shape(collective, algorithm, ranks)
        segments = _segments(about, nbytes, wire)
        found.append(Choice(algorithm, segments, about.seconds(nbytes, wire, segments)))
    return min(found, key=lambda choice: choice.seconds)


def split(collective: str, nbytes: int, ranks: int, paths: Sequence[Path], *, only: str | None = None) -> Split:
    """The cheapest algorithm over several paths, with shares of the tensor that end at the same time on all of them.

    For a large tensor they are in proportion to the bandwidths (the idle links of Wang et al. 2020, section 3); a small
    one takes only the path that is first.
    """
    found = []
    for algorithm in (only,) if only else ALGORITHMS[collective]:
        about = shape(collective, algorithm, ranks)
        shares = [Share(i, part, _segments(about, part, paths[i])) for i, part in _level(about, nbytes, paths)]
        took = max(about.seconds(part, paths[i], cut) for i, part, cut in shares)
        found.append(Split(algorithm, tuple(shares), took))
    return min(found, key=lambda each: each.seconds)


def through(collective: str, nbytes: int, topology: Topology, *, only: str | None = None) -> Form:
    """The cheapest way through hosts: inside a host, between hosts, inside again.

    all_reduce, reduce and broadcast know both forms where all hosts have equally many ranks; all_gather and
    reduce_scatter know `columns` only, and `straight` where hosts differ.
    """
    hosts, each = len(topology.hosts), topology.hosts[0]
    even = len(set(topology.hosts)) == 1
    most = max(topology.hosts)
    inside = topology.inside
    if most == 1:
        between = split(collective, nbytes, hosts, topology.between, only=only)
        return Form("leader", between, between.seconds)
    if collective in ("all_gather", "reduce_scatter") and not even:
        narrow = [path.shared(most) for path in topology.between]
        between = split(collective, nbytes, sum(topology.hosts), narrow, only=only)
        return Form("straight", between, between.seconds)
    found = []
    twice = 2 if collective == "all_reduce" else 1
    within = twice * (inside.latency_s + nbytes / inside.bandwidth)
    if collective not in ("all_gather", "reduce_scatter"):
        between = split(collective, nbytes, hosts, topology.between, only=only)
        found.append(Form("leader", between, between.seconds + within))
    if even and collective not in ("broadcast", "reduce"):
        narrow = [path.shared(each) for path in topology.between]
        between = split(collective, -(-nbytes // each), hosts, narrow, only=only)
        found.append(Form("columns", between, between.seconds + within))
    return min(found, key=lambda form: form.seconds)


def as_path(path: Path | Link) -> Path:
    """A link whose ends spend nothing."""
    return path if isinstance(path, Path) else Path(path.latency_s, path.bandwidth)


def _segments(about: Shape, nbytes: float, path: Path) -> int:
    """The smallest number of segments that costs nearly the least, with messages of SMALLEST_SEGMENT or more."""
    largest = nbytes * about.bytes / max(1, about.messages)
    allowed = [count for count in SEGMENTS if count == 1 or largest / count >= SMALLEST_SEGMENT]
    costs = [about.seconds(nbytes, path, count) for count in allowed]
    return next(count for count, cost in zip(allowed, costs, strict=True) if cost <= NEARLY * min(costs))


def _level(about: Shape, nbytes: int, paths: Sequence[Path]) -> list[tuple[int, int]]:
    """(path, bytes) that end together: the paths that are first are filled until the next one would be as quick."""
    if not about.rounds or len(paths) == 1:
        return [(0, nbytes)]
    start = [about.rounds * p.latency_s + about.messages * p.message_s for p in paths]
    pace = [about.bytes / p.bandwidth + about.adds * p.add_s for p in paths]
    order = sorted(range(len(paths)), key=lambda i: (start[i], pace[i]))
    used = order[:1]
    for count in range(1, len(order) + 1):
        tried = order[:count]
        end = (nbytes + sum(start[i] / pace[i] for i in tried)) / sum(1 / pace[i] for i in tried)
        if end <= start[tried[-1]]:
            break
        used = tried
    end = (nbytes + sum(start[i] / pace[i] for i in used)) / sum(1 / pace[i] for i in used)
    parts = {i: int((end - start[i]) / pace[i]) // ALIGNED * ALIGNED for i in used}
    parts[used[0]] += nbytes - sum(parts.values())
    return [(i, part) for i, part in parts.items() if part or i == used[0]]
