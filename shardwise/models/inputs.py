"""`call(module, batch)`: hand a batch to a module the way its `forward` asks for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardwise.errors import JobError

TARGET_KEYS = ("targets", "labels")  # what losses read; a module gets them only if it cannot be called without


class Parameters(NamedTuple):
    """What a `forward` may be given by name, which of that it cannot do without, and whether it takes any name."""

    names: tuple[str, ...]
    required: frozenset[str]
    any_name: bool


def call(module: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Any:
    """The module's output for a batch.

    `forward(module, batch)` decides if given. Otherwise a mapping is passed by the names in the signature of the
    module's `forward`; a tuple or list gives its first element; anything else is passed as it is. `targets` and
    `labels` are left to the loss unless `forward` requires them. A mapping none of whose keys `forward` names, but
    which has a single entry beside the targets, gives that entry. Raises JobError when a mapping does not fit.
    """
    if forward is not None:
        return forward(module, batch)
    args, kwargs = arguments(module, batch)
    return module(*args, **kwargs)


def arguments(module: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and named arguments with which `call` would call the module."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise JobError("the batch is an empty tuple. Let the data give (inputs, targets) or a mapping by names.")
        return (batch[0],), {}
    if not isinstance(batch, Mapping):
        return (batch,), {}
    wanted = parameters(module)
    passed = {name: batch[name] for name in wanted.names if name in batch and _passes(name, wanted)}
    if wanted.any_name:
        passed.update({key: batch[key] for key in batch if key not in TARGET_KEYS})
    missing = wanted.required - passed.keys()
    if not missing and passed:
        return (), passed
    rest = [key for key in batch if key not in TARGET_KEYS]
    if not passed and len(rest) == 1 and len(missing) <= 1:
        return (batch[rest[0]],), {}
    raise JobError(
        f"{type(module).__name__}.forward takes {', '.join(wanted.names) or 'no arguments'} but the batch has "
        f"{', '.join(map(str, batch)) or 'nothing'}; missing: {', '.join(sorted(missing)) or 'any of them'}. "
        "Name the batch's entries as forward names its arguments, or give the job forward=lambda model, batch: ..."
    )


def parameters(module: nn.Module) -> Parameters:
    """The parameters of the module's `forward`, looking through `torch.compile` and DistributedDataParallel."""
    inner = module
    while isinstance(inner, DistributedDataParallel) or "_orig_mod" in inner._modules:
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._modules["_orig_mod"]  # type: ignore[assignment]
    if "forward" in vars(inner):  # replaced on this one object
        return _inspect(inspect.signature(inner.forward))
    kind: Any = type(inner)
    return _of_class(kind)


@functools.lru_cache(maxsize=256)
def _of_class(kind: Any) -> Parameters:
    signature = inspect.signature(kind.forward)
    return _inspect(signature.replace(parameters=list(signature.parameters.values())[1:]))


def _inspect(signature: inspect.Signature) -> Parameters:
    found = list(signature.parameters.values())
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_name = not named and any(p.kind is p.VAR_KEYWORD for p in found)
    required = frozenset(p.name for p in named if p.default is p.empty)
    return Parameters(tuple(p.name for p in named), required, any_name)


def _passes(name: str, wanted: Parameters) -> bool:
    return name not in TARGET_KEYS or name in wanted.required
