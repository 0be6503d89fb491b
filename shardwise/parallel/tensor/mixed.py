"""The mixtures of experts of a plan: which modules run by experts, and what each rank has of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from shardwise.errors import SpecError
from shardwise.parallel.tensor.experts import children_of, is_list
from shardwise.parallel.tensor.propose import Owned


class Planned(NamedTuple):
    """Parameters of a module's own that are cut by rows, and modules inside of it -> the rank that has them."""

    tables: dict[str, Owned]
    experts: dict[str, int]


def planned(module: nn.Module, owned: Mapping[str, Owned], names: Iterable[str]) -> dict[str, Planned]:
    """The mixtures that the cut parameters called `names` belong to. Raises SpecError where they are none."""
    found: dict[str, Planned] = {}
    chosen = set(names)
    for name in sorted(chosen):
        head, _, key = name.rpartition(".")
        if len(set(owned[name].ids)) > 1:
            found.setdefault(head, Planned({}, {})).tables[key] = owned[name]
            continue
        expert = _expert(module, name, owned, chosen)
        mixture = expert.rpartition(".")[0]
        while is_list(module.get_submodule(mixture)):
            mixture = mixture.rpartition(".")[0]
        path = expert[len(mixture) + 1 :] if mixture else expert
        found.setdefault(mixture, Planned({}, {})).experts[path] = owned[name].ids[0]
    for name, one in found.items():
        _check(name, module.get_submodule(name), one, {rank for cut in owned.values() for rank in cut.ids})
    return found


def _expert(module: nn.Module, name: str, owned: Mapping[str, Owned], chosen: set[str]) -> str:
    """The outermost member of a list all of which is on the rank that has the parameter."""
    ids = set(owned[name].ids)
    path = name.split(".")
    for end in range(1, len(path)):
        inner = ".".join(path[:end])
        if not isinstance(module.get_submodule(".".join(path[: end - 1])), (nn.ModuleList, nn.ModuleDict)):
            continue
        inside = [one for one in owned if one.startswith(inner + ".")]
        every = [f"{inner}.{one}" for one, _ in module.get_submodule(inner).named_parameters()]
        if set(every) <= chosen and all(set(owned[one].ids) == ids for one in inside):
            return inner
    raise _refused(name, "it is in no module of a list that one rank has all of")


def _check(name: str, module: nn.Module, one: Planned, ranks: Collection[int]) -> None:
    if one.experts:
        lists = {path.rpartition(".")[0] for path in one.experts}
        members = {f"{path}.{key}".lstrip(".") for path in lists for key in module.get_submodule(path)._modules}
        if missing := sorted(members - one.experts.keys()):
            raise _refused(name, f"its experts are on ranks, but for '{missing[0]}'")
        if idle := sorted(set(ranks) - set(one.experts.values())):
            raise _refused(name, f"tensor rank {idle[0]} would have no expert")
    if one.tables:
        if len({cut for cut in one.tables.values()}) > 1:
            raise _refused(name, "its parameters are cut at different experts")
        if not any(module._parameters[key].dim() == 3 for key in one.tables):  # type: ignore[union-attr]
            raise _refused(name, "it has no parameter [experts, ...]")


def _refused(name: str, why: str) -> SpecError:
    return SpecError(
        f"splits of the plan have '{name}' by experts, which it cannot be: {why}. Let sw.plan or sw.session find the "
        "splits from the model itself."
    )


def opened(module: nn.Module, name: str, mixtures: Mapping[str, Collection[str]]) -> list[str] | None:
    """The modules inside of `name` that run by themselves, since it is a mixture (name -> its experts) or has one
    inside of it; None where it neither is nor has."""
    if name in mixtures:
        paths = [path for path, _ in children_of(module.get_submodule(name), "", mixtures[name])]
        return [f"{name}.{path}".lstrip(".") for path in paths]
    if not any(one.startswith(name + ".") or not name for one in mixtures):
        return None
    found: list[str] = []
    for key, child in module.get_submodule(name).named_children():
        inner = f"{name}.{key}".lstrip(".")
        found += _through(inner, child)
    return found


def called_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children that a module's code calls: for a list, which has no forward, those in it."""
    for name, child in module.named_children():
        if is_list(child):
            yield from ((f"{name}.{inner}", part) for inner, part in called_children(child))
        else:
            yield name, child


def _through(name: str, module: nn.Module) -> list[str]:
    """The module, or what is in it if it is a list."""
    if not is_list(module):
        return [name]
    return [one for key, child in module.named_children() for one in _through(f"{name}.{key}", child)]


def in_expert(name: str, mixtures: Mapping[str, Collection[str]]) -> bool:
    """Whether the module or parameter called `name` is an expert's."""
    heads = [f"{one}.{path}".lstrip(".") for one, paths in mixtures.items() for path in paths]
    return any(name == head or name.startswith(head + ".") for head in heads)
