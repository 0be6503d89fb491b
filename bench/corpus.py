"""Text to load: words by Zipf's law in lines, and in any amount. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

BLOCK_BYTES = 16 << 20
LETTERS = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", dtype="S1")


def write(path: Path, size: int, *, words: int = 50_000, seed: int = 0) -> None:
    """Write `size` bytes of text: blocks of freshly drawn lines while they are few, then the same lines elsewhere."""
    draw = np.random.default_rng(seed)
    known = [b"".join(draw.choice(LETTERS, draw.integers(2, 10))) for _ in range(words)]
    length = min(BLOCK_BYTES, size)
    fresh = [_block(known, draw, length) for _ in range(min(4, -(-size // length)))]
    written = 0
    with open(path, "wb") as out:
        while written < size:
            block = fresh[written // length % len(fresh)]
            turn = block.index(b"\n", int(draw.integers(0, len(block) // 2))) + 1
            written += out.write((block[turn:] + block[:turn])[: size - written])


def _block(known: list[bytes], draw: np.random.Generator, length: int) -> bytes:
    """`length` bytes of lines of 12 words."""
    count = length // 3
    picked = ((draw.zipf(1.2, count) - 1) % len(known)).tolist()
    lines = [b" ".join(known[word] for word in picked[at : at + 12]) for at in range(0, count, 12)]
    return b"\n".join(lines)[: length - 1] + b"\n"
