"""Float formats of a step: autocast for bfloat16 and float16, loss scaling for float16, whole modules in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shardwise.errors import SpecError
from shardwise.parallel.doubles import Doubles
from shardwise.spec.plan import Precision

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class LossScaler:
    """Keeps float16 gradients in range: the loss is multiplied by `scale`, which halves when a gradient overflows and
    doubles after `patience` good steps (Micikevicius et al. 2018, section 3.2)."""

    def __init__(self, scale: float = 2.0**16, patience: int = 2000) -> None:
        self.scale = scale
        self.good_steps = 0
        self._patience = patience

    def update(self, *, finite: bool) -> None:
        """Tell how the step went."""
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
            return
        self.good_steps += 1
        if self.good_steps >= self._patience:
            self.scale, self.good_steps = min(2.0**24, self.scale * 2), 0


class Formats:
    """What a plan's precision means on a device; with `doubles` grouped products may be of float64.

    Raises SpecError for a format that the device cannot compute in.
    """

    def __init__(self, precision: Precision, device: torch.device, *, doubles: bool = False) -> None:
        self.precision = precision
        self._doubles = doubles
        self.device = device
        self.around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # every forward
        self.cast = DTYPES[precision] if precision in ("bfloat16", "float16") else None
        if self.cast is not None and not _supported(device.type, self.cast):
            raise SpecError(
                f"precision={precision} is not supported by this torch on {device.type}. "
                "Use precision=bfloat16 or float32."
            )

    @contextlib.contextmanager
    def step(self, *, several: bool) -> Iterator[None]:
        """Around a whole step: with `several` batches parameters are cast once for all of them, not once for each.

        With one nothing is kept, so that backward can use the memory of each cast again while it is hot.
        """
        if self.cast is None or not several:
            with Doubles() if self._doubles else contextlib.nullcontext():
                yield
            return
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around forward and loss."""
        cast = torch.autocast(self.device.type, dtype=self.cast) if self.cast is not None else contextlib.nullcontext()
        with cast, self.around():
            yield

    def place(self, batch: Any) -> Any:
        """The batch on the device; floating tensors become float64 under precision=float64."""
        wide = self.precision == "float64"
        if self.device.type == "cpu" and not wide:
            return batch

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dtype = torch.float64 if wide and leaf.is_floating_point() else leaf.dtype
            return leaf.to(self.device, dtype, non_blocking=True)

        return tree_map(move, batch)


def _supported(device: str, dtype: torch.dtype) -> bool:
    """Try it: one small matrix product under autocast, with its gradient."""
    try:
        with torch.autocast(device, dtype=dtype):
            weight = torch.ones(2, 2, device=device, requires_grad=True)
            product = torch.nn.functional.linear(torch.ones(2, 2, device=device), weight)
        product.float().sum().backward()
    except (RuntimeError, NotImplementedError):
        return False
    return product.dtype == dtype
