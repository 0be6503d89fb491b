"""Where a module is a mixture of experts: proposed by structure, kept by proof.

Two kinds are looked for: a module with parameters [E, ...] of its own, and one that calls the like modules of a list.
Neither is captured: the module's own code is run, in float64, once whole and once for each rank with that rank's
experts; kept is a split of which the ranks' terms give the outputs and gradients of the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.parallel.tensor.atoms import Ids, deal
from shardwise.parallel.tensor.capture import capture
from shardwise.parallel.tensor.experts import is_list
from shardwise.parallel.tensor.mixture_proof import Mixed, Proof, Unfit, copied, unchanged
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.standins import swapped
from shardwise.spec.plan import Split


def widened(module: nn.Module, asked: Mapping[str, Split]) -> dict[str, Split]:
    """What was asked for, with the name of a list of experts standing for all that is in it."""
    lists = [name for name, part_of in module.named_modules() if isinstance(part_of, (nn.ModuleList, nn.ModuleDict))]
    found: dict[str, Split] = {}
    for pattern, split in asked.items():
        found[pattern] = split
        if split.how in ("experts", "whole") and any(fnmatchcase(name, pattern) for name in lists):
            del found[pattern]
            found[f"{pattern}.*"] = split
    return found


def tables_of(module: nn.Module, ranks: int, keep: Collection[str] = ()) -> list[str]:
    """The module's own parameters that may have a row for each expert: first those with three dims, by which it is
    known, then those with two. A layer of torch's has none."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    counts = {p.shape[0] for p in own.values() if p.dim() == 3 and min(p.shape[1:]) > 1}
    if len(counts) != 1 or type(module).__module__.startswith("torch."):
        return []
    count = next(iter(counts))
    if count < max(2, ranks):
        return []
    like = [name for name, p in own.items() if p.dim() in (2, 3) and p.shape[0] == count and name not in keep]
    size = sum(own[name].numel() for name in like if own[name].dim() == 3)
    if 2 * size < sum(p.numel() for p in module.parameters()):
        return []
    return sorted(like, key=lambda name: -own[name].dim())


def lists_of(module: nn.Module, ranks: int, prefix: str = "") -> Iterator[list[str]]:
    """The lists of like modules that a module's own code may choose from: the paths of their members."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        members = dict(module._modules)
        if len(members) >= max(2, ranks) and len({_kind(one) for one in members.values()}) == 1 and _some(module):
            yield [f"{prefix}{name}" for name in members]
            return
    for name, child in module._modules.items():
        if child is not None and is_list(child):
            yield from lists_of(child, ranks, f"{prefix}{name}.")


def _kind(module: nn.Module | None) -> Any:
    if module is None:
        return None
    return type(module), tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())


def _some(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def may_be_mixture(module: nn.Module, args: Any, kwargs: Any, ranks: int, keep: Collection[str] = ()) -> bool:
    """Whether it looks like one, before any proof."""
    lists = lists_of(module, ranks)
    return bool(tables_of(module, ranks, keep)) or any(_chooses(module, args, kwargs, paths) for paths in lists)


def find_mixture(
    module: nn.Module,
    args: Any,
    kwargs: Any,
    ranks: int,
    *,
    keep: Collection[str] = (),
    asked: Mapping[str, Ids] | None = None,
) -> Mixed | None:
    """The proven split of a module's experts over `ranks`, where it has any; parameters in `keep` stay whole.

    The module, and what it is called with, are in float64 and nobody else's. `asked` are names in the module -> the
    ranks of the rows (or none, for any). Raises Unfit where it looks like a mixture and cannot be split.
    """
    asked = asked or {}
    names = tables_of(module, ranks, keep)
    if names:
        with _about(names):
            return _by_rows(module, args, kwargs, ranks, names, asked)
    for paths in lists_of(module, ranks):
        inside = {f"{path}.{name}" for path in paths for name, _ in module.get_submodule(path).named_parameters()}
        if inside & set(keep) or not _chooses(module, args, kwargs, paths):
            continue
        if not inside & asked.keys() and capture(module, args, kwargs) is not None:
            continue  # no number decides what runs: its layers are split as others are
        with _about(sorted(inside)):
            return _by_module(module, args, kwargs, ranks, paths, asked)
    return None


@contextmanager
def _about(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except Unfit as why_not:
        why_not.names = tuple(names)
        raise


def _by_rows(
    module: nn.Module, args: Any, kwargs: Any, ranks: int, names: Sequence[str], asked: Mapping[str, Ids]
) -> Mixed:
    own = module._parameters
    count = own[names[0]].shape[0]  # type: ignore[union-attr]
    told = {one for name, one in asked.items() if name in names and one}
    if len(told) > 1:
        raise Unfit("its parameters are asked to be cut at different experts")
    ids = told.pop() if told else _dealt(count, ranks)
    _refuse_empty(ids, ranks)
    proof = Proof(module, args, kwargs, ranks)
    try:
        return proof.of({name: Owned(0, ids) for name in names}, {})
    except Unfit:
        if len({own[name].dim() for name in names}) == 1:  # type: ignore[union-attr]
            raise
    # a matrix with as many rows may be the router's
    kept = {name: Owned(0, ids) for name in names if own[name].dim() == 3}  # type: ignore[union-attr]
    found = proof.of(kept, {})
    for name in names:
        if name not in kept:
            try:
                found = proof.of({**found.tables, name: Owned(0, ids)}, {})
            except Unfit:
                continue
    return found


def _by_module(
    module: nn.Module, args: Any, kwargs: Any, ranks: int, paths: Sequence[str], asked: Mapping[str, Ids]
) -> Mixed:
    owners = dict(zip(paths, _dealt(len(paths), ranks), strict=True))
    for path in paths:
        for name, p in module.get_submodule(path).named_parameters():
            if p.dim() == 0:
                raise Unfit(f"the experts have a parameter without dims, '{name}'")
            if ids := asked.get(f"{path}.{name}"):
                if len(set(ids)) > 1:
                    raise Unfit("an expert of a list is all on one rank")
                owners[path] = ids[0]
    _refuse_empty(tuple(owners.values()), ranks)
    return Proof(module, args, kwargs, ranks).of({}, owners)


def _dealt(count: int, ranks: int) -> Ids:
    owner = deal(range(count), ranks)
    return tuple(owner[index] for index in range(count))


def _refuse_empty(ids: Ids, ranks: int) -> None:
    if missing := set(range(ranks)) - set(ids):
        raise Unfit(f"tensor rank {min(missing)} would have no expert")


class _Chained(Exception):
    pass


def _chooses(module: nn.Module, args: Any, kwargs: Any, paths: Sequence[str]) -> bool:
    """Whether some members of a list are called, and with what does not come from one another."""
    given: dict[str, Any] = {}

    def note(path: str, inner: nn.Module, *a: Any, **k: Any) -> Any:
        given.setdefault(path, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (a, k)))
        return inner(*a, **k)

    seen: set[str] = set()

    def silent(path: str, inner: nn.Module, *a: Any, **k: Any) -> Any:
        if path not in given or (path not in seen and not _equal(given[path], (a, k))):
            raise _Chained
        seen.add(path)
        return tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, inner(*a, **k))

    with torch.no_grad(), unchanged(module):
        for visit in (note, silent):
            torch.manual_seed(0)
            try:
                with _visited(module, paths, visit):
                    module.forward(*copied(args), **copied(kwargs))
            except Exception:  # one follows another, or its code cannot go on
                return False
    return bool(given)


class _Visited:
    def __init__(self, path: str, inner: nn.Module, visit: Any) -> None:
        self._path, self._inner, self._visit = path, inner, visit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._visit(self._path, self._inner, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextmanager
def _visited(module: nn.Module, paths: Sequence[str], visit: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for path in paths:
            head, _, key = path.rpartition(".")
            held = module.get_submodule(head)._modules
            stack.enter_context(swapped(held, key, _Visited(path, held[key], visit)))  # type: ignore[arg-type]
        yield


def _equal(a: Any, b: Any) -> bool:
    one, tree = tree_flatten(a)
    two, other = tree_flatten(b)
    if tree != other:
        return False
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x is y or x == y for x, y in zip(one, two, strict=True))
