"""What stands in for the modules inside of a mixture while its own code runs: silent experts, and guarded children."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

MOST = 256


def enterable(leaf: Any) -> bool:
    """Whether a gradient may go through it."""
    return isinstance(leaf, Tensor) and leaf.requires_grad


@contextmanager
def swapped(held: MutableMapping[str, Any], key: str, other: Any) -> Iterator[None]:
    """In this block `held[key]` is something else."""
    before = held[key]
    held[key] = other
    try:
        yield
    finally:
        held[key] = before


class Shapes:
    """What an expert's output looks like, seen from `expert`, which is one of its kind: of any number of rows."""

    def __init__(self, expert: nn.Module) -> None:
        self._expert = expert
        self._known: dict[Any, tuple[Any, list[Any]]] = {}

    def filled(self, value: float, args: Any, kwargs: Any) -> Any:
        """What the expert would return, with `value` for every number."""
        leaves, tree = tree_flatten((args, kwargs))
        rows = next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
        key = self._key(leaves, tree, rows)
        if key not in self._known:
            if len(self._known) == MOST:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._look(leaves, tree, rows)
        out, kinds = self._known[key]
        return tree_unflatten([kind(rows, value) if callable(kind) else kind for kind in kinds], out)

    def _key(self, leaves: Any, tree: Any, rows: int | None) -> Any:
        def kind(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            shape = tuple(leaf.shape)
            follows = bool(shape) and shape[0] == rows
            return (shape[1:] if follows else shape, follows, leaf.dtype, leaf.device)

        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return tree, tuple(kind(leaf) for leaf in leaves), cast, self._expert.training

    def _look(self, leaves: Any, tree: Any, rows: int | None) -> tuple[Any, list[Any]]:
        """Run it twice, on unlike numbers of rows: a dim that follows them is as long as the rows are many."""
        seen = []
        for many in (2, 3):
            given = [
                leaf.new_zeros(many, *leaf.shape[1:])
                if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows
                else leaf
                for leaf in leaves
            ]
            args, kwargs = tree_unflatten(given, tree)
            with torch.no_grad(), _disable_current_modes():
                seen.append(tree_flatten(self._expert.forward(*args, **kwargs)))
        (few, out), (more, _) = seen
        return out, [_kind(a, b) for a, b in zip(few, more, strict=True)]


def _kind(few: Any, more: Any) -> Any:
    if not isinstance(few, Tensor):
        return few
    sizes = [None if a != b else a for a, b in zip(few.shape, more.shape, strict=True)]

    def made(rows: int | None, value: float) -> Tensor:
        shape = [int(rows or 0) if size is None else size for size in sizes]
        return few.new_full(shape, value if few.is_floating_point() else 0)

    return made


class Silent:
    """An expert of which the numbers are `value`, and which computes nothing; `called` notes that it should have."""

    def __init__(self, inner: nn.Module, shapes: Shapes, value: float, called: list[nn.Module]) -> None:
        self._inner, self._shapes, self._value, self._called = inner, shapes, value, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._called.append(self._inner)
        return self._shapes.filled(self._value, args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._inner)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if isinstance(found, (nn.Parameter, nn.Module)):
            raise RuntimeError(f"the mixture reads '{name}' of an expert instead of calling it")
        return found


class Caller(Protocol):
    """Runs a child's call; see `experts._Run`."""

    def child(self, name: str, inner: Any, args: Any, kwargs: Any) -> Any: ...

    def parameters(self, given: Any) -> list[Tensor]: ...


class Guarded:
    """A child that is no expert: its calls are computed as outside of the mixture, and parameters that are read from it
    enter."""

    def __init__(self, inner: nn.Module, name: str, run: Caller) -> None:
        self._inner, self._name, self._run = inner, name, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run.child(self._name, self._inner, args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._inner)

    def __getattr__(self, name: str) -> Any:
        return self._of(name, getattr(self._inner, name))

    def __getitem__(self, index: Any) -> Any:
        return self._of(str(index), self._inner[index])  # type: ignore[index]

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        every: Any = self._inner
        return (self._of(str(index), one) for index, one in enumerate(every))

    def _of(self, name: str, found: Any) -> Any:
        if isinstance(found, nn.Parameter):
            return self._run.parameters([found])[0]
        if isinstance(found, nn.Module):
            return Guarded(found, f"{self._name}.{name}", self._run)
        return found
