"""`Exchange`: how a flat bucket of gradients becomes the sum over ranks, where an all-reduce is not what does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Piece(NamedTuple):
    """One parameter's gradient in a bucket: `shape` from element `offset` of the body on."""

    name: str
    offset: int
    shape: tuple[int, ...]


class Bucketed(NamedTuple):
    """One bucket as it is laid out: `numel` elements of body, and whose gradients they are."""

    numel: int
    dtype: torch.dtype
    device: torch.device
    pieces: tuple[Piece, ...]


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> object:
        """Block until the bucket has the sums. Raises CommError as the group does."""


class Exchange(Protocol):
    """What the reducer calls in place of an all-reduce; on every rank in the same order.

    While `exact` is true its sums lose nothing and are those of the step itself.
    """

    exact: bool

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        """The buckets are laid out like this from now on. What is kept for a parameter is kept under its name."""

    def start(self, number: int, flat: Tensor, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        """Begin with bucket `number`, while backward goes on; `flat` is `body` (gradients) and then `tail`.

        The tail becomes the exact sum over ranks, the body the sum (or the `mean`), with the same bits on all ranks.
        """

    def close(self) -> None:
        """No step follows."""

    def state(self) -> dict[str, Tensor]:
        """What this rank keeps from step to step, by name."""

    def load_state(self, ranks: Sequence[Mapping[str, Tensor]], rank: int) -> None:
        """Take over what the ranks of a checkpoint (perhaps another number of them) kept."""
