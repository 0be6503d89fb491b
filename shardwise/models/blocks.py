"""Find the chain of repeated blocks in a module by its structure alone, and which parameter belongs to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from shardwise.spec.profile import LinearProfile

LEAST_SHARE = 0.1  # a repeated class with a smaller share of the parameters is a detail, not the chain


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> block, in the order of definition.

    Blocks are the children of every outermost `ModuleList`, `Sequential` or uniform `ModuleDict` that repeats a class
    at least twice, if the repeated children hold at least a tenth of the module's parameters (or if there are none at
    all). So stages in several lists (ResNet, encoder-decoder) make one chain. Empty when nothing is repeated.
    """
    total = num_parameters([module])
    found: dict[str, nn.Module] = {}
    _walk(module, "", total, found)
    return found if len(found) > 1 else {}


def _walk(module: nn.Module, name: str, total: int, found: dict[str, nn.Module]) -> None:
    children = {f"{name}.{child_name}" if name else child_name: child for child_name, child in module.named_children()}
    if _is_chain(module, list(children.values()), total):
        found.update(children)
        return
    for child_name, child in children.items():
        _walk(child, child_name, total, found)


def _is_chain(module: nn.Module, children: list[nn.Module], total: int) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or not children:
        return False
    kinds = Counter(type(child) for child in children)
    if isinstance(module, nn.ModuleDict) and len(kinds) > 1:
        return False
    # Several embeddings (words, positions, types) stand side by side, not in a chain.
    repeated = [child for child in children if kinds[type(child)] > 1 and not isinstance(child, nn.Embedding)]
    return len(repeated) > 1 and num_parameters(repeated) >= LEAST_SHARE * total


def num_parameters(modules: Iterable[nn.Module]) -> int:
    """The number of elements of all parameters, each counted once."""
    unique = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in unique.values())


def owner(name: str, blocks: Iterable[str]) -> str | None:
    """The block that the parameter or module called `name` is in, or None."""
    return next((block for block in blocks if name == block or name.startswith(block + ".")), None)


def tied_groups(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are the same tensor, in groups of two and more."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def linears(module: nn.Module) -> Iterator[LinearProfile]:
    """The linear layers of a module; Conv1D of transformers is one, with its weight transposed."""
    for name, inner in module.named_modules():
        sizes = _linear_sizes(inner)
        if sizes is not None:
            yield LinearProfile(name=name, in_features=sizes[0], out_features=sizes[1])


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module._parameters.get("weight")
    if type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None
