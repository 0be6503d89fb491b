"""Which sample is in which step: a pure function of the seed and the step, the same for any number of ranks.

position = step * global_batch + i        the i-th sample of a step, counted over the whole run
epoch, offset = divmod(position, n)       epochs follow each other without a gap; a step may straddle two
sample = permutation[seed, epoch](offset) pseudo-random, computed, never stored
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SPREAD = 0xD1342543DE82EF95  # odd: keeps a number from cancelling the state before it
_ROUNDS = 8


def sample_index(position: int, n: int, seed: int) -> int:
    """The sample (0..n-1) at `position` (>= 0) of the run; each epoch of `n` positions holds every sample once."""
    return int(sample_indices(np.array([position], dtype=np.int64), n, seed)[0])


def sample_indices(positions: npt.ArrayLike, n: int, seed: int) -> Ints:
    """`sample_index` of many positions at once, in memory proportional to the positions, not to `n`.

    The permutation is a Feistel network over Z_a x Z_b with a * b just above n, walked until it lands below n
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", the generalised Feistel construction).
    """
    if n < 1:
        raise ValueError(f"n={n}: an order needs at least one sample.")
    shape = np.shape(positions)
    where = np.asarray(positions, dtype=np.int64).ravel()
    epochs, offsets = np.divmod(where, n)
    keys = _chain(_as_words(seed, where.shape), epochs.astype(np.uint64))
    side = math.isqrt(n - 1) + 1
    other = -(-n // side)
    found = _feistel(offsets.astype(np.uint64), keys, side, other)
    outside = np.flatnonzero(found >= np.uint64(n))
    while outside.size:
        found[outside] = _feistel(found[outside], keys[outside], side, other)
        outside = outside[found[outside] >= np.uint64(n)]
    return found.astype(np.int64).reshape(shape)


def rank_slice(global_batch: int, ranks: int, rank: int) -> range:
    """The samples of a step that `rank` computes: contiguous, sizes differ by at most 1, empty for surplus ranks."""
    return _block(global_batch, ranks, rank)


def shard_slices(global_batch: int, logical_shards: int) -> list[range]:
    """A step's samples cut into logical shards, whatever the number of ranks."""
    return [_block(global_batch, logical_shards, shard) for shard in range(logical_shards)]


def shards_of(rank: int, ranks: int, shards: int) -> range:
    """The logical shards that `rank` computes: contiguous, sizes differ by at most 1."""
    return _block(shards, ranks, rank)


def stream_seed(seed: int, *numbers: int) -> int:
    """A seed in 0..2**63-1 for the random stream named by `numbers`; equal names give equal seeds anywhere."""
    state = _hash(seed & _MASK)
    for number in numbers:
        state = _hash((state * _SPREAD + _hash(number & _MASK)) & _MASK)
    return state >> 1


def stream_seeds(seed: int, positions: npt.ArrayLike) -> Ints:
    """`stream_seed(seed, position)` of many positions at once."""
    where = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    return (_chain(hash_words(_as_words(seed, where.shape)), where) >> np.uint64(1)).astype(np.int64)


def hash_words(words: _Words) -> _Words:
    """A pseudo-random 64-bit word for each word (the finaliser of splitmix64: Steele, Lea and Flood 2014)."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _hash(word: int) -> int:
    """`hash_words` of one Python integer: numpy's cost a call is twenty times this."""
    word = (word + _GOLDEN) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _block(total: int, parts: int, part: int) -> range:
    if total < 0 or not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts} of {total} things does not exist.")
    small, larger = divmod(total, parts)
    first = part * small + min(part, larger)
    return range(first, first + small + (part < larger))


def _as_words(number: int, shape: Sequence[int]) -> _Words:
    return np.full(shape, number & _MASK, dtype=np.uint64)


def _chain(state: _Words, numbers: _Words) -> _Words:
    return hash_words(state * np.uint64(_SPREAD) + hash_words(numbers))


def _feistel(offsets: _Words, keys: _Words, side: int, other: int) -> _Words:
    moduli = (np.uint64(side), np.uint64(other))
    left, right = offsets % moduli[0], offsets // moduli[0]
    for number in range(_ROUNDS):
        word = hash_words(right ^ hash_words(keys + np.uint64(number)))
        left, right = right, (left + word % moduli[number % 2]) % moduli[number % 2]
    return left + moduli[0] * right
