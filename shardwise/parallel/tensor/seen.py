"""One run of a module, watched: what each part was called with, and where each parameter was used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.models.inputs import call
from shardwise.parallel.tensor.capture import PLAIN
from shardwise.parallel.tensor.guards import python_draws

Forward = Callable[[nn.Module, Any], Any]
Values = Callable[[str, Tensor], Tensor]


class Seen(NamedTuple):
    """One run: the arguments of each module's first call, and in which modules each parameter is used."""

    calls: dict[str, tuple[Any, Any]]
    users: dict[str, set[tuple[str, ...]]]


class Uses(TorchFunctionMode):
    """Notes in which modules each parameter is an operand, and puts its values in its place."""

    def __init__(self, names: Mapping[int, str], values: Values) -> None:
        super().__init__()
        self.names, self.values, self.stack = names, values, [""]
        self.users: dict[str, set[tuple[str, ...]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__"):  # its shape is no use, `.T` is
            found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
        args, kwargs = tree_map(self._used, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _used(self, leaf: Any) -> Any:
        if not isinstance(leaf, nn.Parameter) or id(leaf) not in self.names:
            return leaf
        name = self.names[id(leaf)]
        self.users.setdefault(name, set()).add(tuple(self.stack))
        return self.values(name, leaf)


def run_once(module: nn.Module, batch: Any, forward: Forward | None, values: Values) -> Seen:
    """What alike modules are called with is kept once: the first call's stands for the others'."""
    calls: dict[str, tuple[Any, Any]] = {}
    kinds: dict[Any, tuple[Any, Any]] = {}
    uses = Uses({id(p): name for name, p in module.named_parameters()}, values)

    def enter(name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        uses.stack.append(name)
        if name not in calls:
            leaves, tree = tree_flatten((args, kwargs))
            sizes = tuple(p.shape for p in part.parameters())  # one table's indices need not be in another
            kind = (type(part), sizes, str(tree), *map(_kind, leaves))
            if kind not in kinds:
                kinds[kind] = tree_map(_kept, (args, kwargs))
            calls[name] = kinds[kind]

    def leave(name: str, *_: Any) -> None:
        uses.stack.pop()

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    training = module.training
    with ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(partial(leave, name)).remove)
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(python_draws())
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_cache(module))
        stack.enter_context(uses)
        call(module.train(), batch, forward)
    module.train(training)
    for name, buffer in module.named_buffers():
        if name in before:
            buffer.copy_(before[name])
    return Seen(calls, uses.users)


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """Models of transformers hand a cache of keys through their blocks, which training does not read."""
    told = [c for c in {id(c): c for c in configurations(module)}.values() if getattr(c, "use_cache", False)]
    for one in told:
        one.use_cache = False
    try:
        yield
    finally:
        for one in told:
            one.use_cache = True


def configurations(module: nn.Module) -> Iterator[Any]:
    """What models of transformers are configured with."""
    for part in module.modules():
        if (config := getattr(part, "config", None)) is not None and not isinstance(config, nn.Module):
            yield config


def _kept(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, PLAIN) else id(leaf)
