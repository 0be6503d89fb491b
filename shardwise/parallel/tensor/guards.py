"""What a graph of a call cannot say: that the call changed something, or would run otherwise after a change."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

READ = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STORES = ("_parameters", "_buffers", "_modules")
DEEP = 6  # containers in one another


def attributes(parts: Sequence[nn.Module]) -> tuple[Any, ...]:
    """The plain attributes of modules, such as `training` and the `p` of a dropout, and which tensors they hold."""
    return tuple(
        value if type(value) in READ else id(value)
        for part in parts
        for value in vars(part).values()
        if type(value) in READ or isinstance(value, Tensor)
    )


class Watched(nn.Module):
    """Runs a module, and sees whether it puts another tensor in the place of a buffer or a parameter."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.replaced = part, False

    def forward(self, args: Any, kwargs: Any) -> Any:
        before = self._held()
        output = self.part(*args, **kwargs)
        self.replaced = self._held() != before
        return output

    def _held(self) -> list[tuple[str, int]]:
        every = [(each._parameters, each._buffers) for each in self.part.modules()]
        return [(name, id(tensor)) for kinds in every for kind in kinds for name, tensor in kind.items()]


def hooked(module: nn.Module) -> bool:
    """Whether a module inside has hooks, which would see tensors without numbers."""
    inside = (part for part in module.modules() if part is not module)
    return any(vars(part).get(hooks) for part in inside for hooks in HOOKS)


@contextmanager
def python_draws() -> Iterator[Callable[[], bool]]:
    """Python's and numpy's generators are left as they were; the function says whether they were used."""
    ours, theirs = random.getstate(), np.random.get_state()

    def drawn() -> bool:
        return random.getstate() != ours or not _same(np.random.get_state(), theirs)

    try:
        yield drawn
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)


def _same(a: Any, b: Any) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


class Held:
    """What the attributes of a module and of those inside are, as deep as containers and plain objects go."""

    def __init__(self, module: nn.Module) -> None:
        self._seen: dict[int, Any] = {}  # keeps them alive: an id says who it is only so long
        held = (item for part in module.modules() for item in vars(part).items() if item[0] not in STORES)
        self._state = [(name, self._of(value, 0)) for name, value in held]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self._state == other._state

    __hash__ = None  # type: ignore[assignment]

    def _of(self, value: Any, depth: int) -> Any:
        if type(value) in READ:
            return value
        if isinstance(value, Tensor):
            self._seen[id(value)] = value
            return id(value), value._version
        if id(value) in self._seen or depth == DEEP:
            return id(value)
        self._seen[id(value)] = value
        if isinstance(value, (list, tuple, collections.deque, set, frozenset)):
            return id(value), [self._of(one, depth + 1) for one in value]
        if isinstance(value, dict):
            return id(value), [(str(key), self._of(one, depth + 1)) for key, one in value.items()]
        if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__") or callable(value):
            return id(value)
        return id(value), self._of(vars(value), depth + 1)
