"""`Residuals`: what compression left out of each gradient, added to the next one (error feedback)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardwise.comm.exchange import Bucketed
from shardwise.errors import CheckpointError


class Residuals:
    """This rank's residuals: flat as the buckets are (float32; float64 for float64 buckets), kept by parameter name.

    Seide et al. 2014, "1-bit stochastic gradient descent", section 2; Karimireddy et al. 2019, "Error feedback fixes
    SignSGD", algorithm 2. They are made when they are first asked for. `scale` is what gradients are multiplied with:
    set it when that changes, and the residuals follow.
    """

    def __init__(self) -> None:
        self._buckets: Sequence[Bucketed] = ()
        self._flats: list[Tensor | None] = []
        self._parked: dict[str, Tensor] = {}  # of parameters that are in no bucket now
        self._scale = 1.0

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        """Lay the residuals out anew."""
        self._park()
        self._buckets = buckets
        self._flats = [None] * len(buckets)
        for number, bucket in enumerate(buckets):
            if any(piece.name in self._parked for piece in bucket.pieces):
                self.of(number)

    def of(self, number: int) -> Tensor:
        """Bucket `number`'s residual [numel], zeros at first; the caller changes it in place."""
        flat = self._flats[number]
        if flat is None:
            bucket = self._buckets[number]
            flat = torch.zeros(bucket.numel, dtype=wide(bucket.dtype), device=bucket.device)
            for piece in bucket.pieces:
                kept = self._parked.pop(piece.name, None)
                if kept is not None:
                    _slice(flat, piece.offset, piece.shape).copy_(fitting(kept, piece.name, piece.shape))
            self._flats[number] = flat
        return flat

    def give_back(self, number: int, body: Tensor) -> None:
        """Add bucket `number`'s residual to a body that is about to be summed without loss; it is zero afterwards."""
        flat = self._flats[number]
        if flat is not None:
            body.add_(flat)
            self._flats[number] = None

    def rescale(self, scale: float) -> None:
        """Gradients are multiplied with `scale` from now on (a loss scale, one over the global weight)."""
        if scale != self._scale:
            for kept in [*self._flats, *self._parked.values()]:
                if kept is not None:
                    kept.mul_(scale / self._scale)
            self._scale = scale

    def state(self) -> dict[str, Tensor]:
        """Every parameter's residual at scale 1, in its shape; zeros where nothing was left out yet."""
        found = {name: kept / self._scale for name, kept in self._parked.items()}
        for bucket, flat in zip(self._buckets, self._flats, strict=True):
            for piece in bucket.pieces:
                if flat is None:
                    kept = torch.zeros(piece.shape, dtype=wide(bucket.dtype), device=bucket.device)
                else:
                    kept = _slice(flat, piece.offset, piece.shape) / self._scale
                found[piece.name] = kept
        return found

    def load_state(self, ranks: Sequence[Mapping[str, Tensor]], rank: int, size: int) -> None:
        """Take over what the ranks of a checkpoint kept: this rank's own, or an equal share of all of it.

        The sum over ranks is what matters, and stays as it was.
        """
        found = shared(ranks, rank, size)
        self._parked = {name: kept * self._scale for name, kept in found.items()}
        self._flats = [None] * len(self._buckets)
        self.arrange(self._buckets)

    def _park(self) -> None:
        for bucket, flat in zip(self._buckets, self._flats, strict=True):
            for piece in bucket.pieces if flat is not None else ():
                assert flat is not None
                self._parked[piece.name] = _slice(flat, piece.offset, piece.shape).clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients of `dtype` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slice(flat: Tensor, offset: int, shape: Sequence[int]) -> Tensor:
    """In the order in which the bucket holds it, which is the parameter's own where that is not row by row."""
    return flat[offset : offset + math.prod(shape)].view(tuple(shape))


def shared(ranks: Sequence[Mapping[str, Tensor]], rank: int, size: int) -> dict[str, Tensor]:
    """The residuals of rank `rank` of `size` from those of all ranks before: its own, or an equal share of the sum."""
    if len(ranks) == size:
        return dict(ranks[rank])
    names = dict.fromkeys(name for state in ranks for name in state)
    return {name: torch.stack([state[name] for state in ranks if name in state]).sum(0) / size for name in names}


def fitting(kept: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """Raises CheckpointError where `kept` has not the parameter's shape."""
    if tuple(kept.shape) != tuple(shape):
        raise CheckpointError(
            f"the residual of '{name}' has shape {tuple(kept.shape)}, its parameter {tuple(shape)}: the checkpoint is "
            "another model's. Resume without it, or with the model that it was made with."
        )
    return kept
