"""What one block hands to the next while it is cut along the sequence: whoever else reads it gets it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shardwise.errors import JobError
from shardwise.parallel.tensor.atoms import Cut
from shardwise.parallel.tensor.parted import Parted, asks_about

FROM_NOW = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")  # what looks at its whole gradient


class Handed(Parted):
    """A block's output. The first function that reads it joins it; the joined tensor is kept, so that what is written
    into it, or into a view of it, is there for all who read it later."""

    what = "a block's output"
    _joined: Tensor | None = None
    _passed = False

    def whole(self) -> Tensor:
        """The joined tensor. Collective the first time."""
        if self._joined is None:
            with torch.set_grad_enabled(self.local.requires_grad):  # also where it is first read without gradients
                self._joined = self.links.join(self.local, self.split_dim, self.ids)
        return self._joined

    def passes(self) -> Cut | None:
        """How a block gets it: as it is cut, or None where others have read it whole before, or changed it since."""
        joined = self._joined
        if joined is not None and (not self._passed or joined._version > 0):
            return None
        self._passed = True
        return Cut(self.split_dim, self.ids)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if asks_about(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in FROM_NOW and args[0]._passed:
            raise JobError(
                f"{name} on {cls.what} after the next block has run: with sequence=true it goes there in parts. Call "
                "it before, or use sequence=false."
            )
        args, kwargs = tree_map(lambda one: one.whole() if isinstance(one, Parted) else one, (args, kwargs or {}))
        return func(*args, **kwargs)


def brought_together(value: Any) -> Any:
    """The value with everything in it whole."""
    return tree_map(lambda leaf: leaf.whole() if isinstance(leaf, Handed) else leaf, value)
