"""A module and its optimizers <-> named tensors and plain data, without pickle; what is tied is there once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import msgspec
import torch
from msgspec import Struct, field
from torch import nn

from shardwise.checkpoint.manifest import Manifest
from shardwise.checkpoint.tensorfile import dtype_of, local_part
from shardwise.errors import CheckpointError
from shardwise.spec.layout import holds, local_shape, stage_rank, stages_with
from shardwise.spec.plan import Plan

Empty = Callable[[nn.Parameter, torch.dtype], torch.Tensor]
_HOW = ("foreach", "fused", "capturable", "differentiable")  # how an optimizer computes here, not what


class _Group(Struct):
    params: list[str]
    options: dict[str, Any]


class _Described(Struct):
    groups: list[_Group]
    state: dict[str, dict[str, Any]]
    name: str = field(name="class")


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """`model/<parameter>` and `buffer/<buffer>` -> the module's own tensors; each tied parameter under its first name.

    Names are those of `named_parameters`, without the marks that `torch.compile` puts in. Buffers that the module
    does not keep in its state dict are left out.
    """
    found: dict[str, torch.Tensor] = {f"model/{_clean(n)}": p.detach() for n, p in module.named_parameters()}
    skipped = {
        f"{prefix}.{name}".lstrip(".") for prefix, part in module.named_modules() for name in _passing_buffers(part)
    }
    for name, buffer in module.named_buffers():
        if name not in skipped:
            found[f"buffer/{_clean(name)}"] = buffer
    return found


def tied_names(module: nn.Module) -> dict[str, str]:
    """Each further name of a tied parameter -> the name under which it is saved."""
    first = {id(parameter): _clean(name) for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {_clean(name): first[id(p)] for name, p in every if _clean(name) != first[id(p)]}


def extra_state(module: nn.Module) -> dict[str, Any]:
    """What submodules return from `get_extra_state`, by their name; `save` refuses what is not plain data."""
    return {_clean(name): part.get_extra_state() for name, part in module.named_modules() if _has_extra_state(part)}


def optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], module: nn.Module
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """`optimizer/<parameter>/<state>` -> the optimizers' tensors; and as plain data all else that they keep.

    Raises CheckpointError for a parameter that is not the module's or that two optimizers share.
    """
    names = {id(p): _clean(name) for name, p in module.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    described = []
    seen: set[int] = set()
    for number, optimizer in enumerate(optimizers):
        state: dict[str, Any] = {}
        groups = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = _name_of(p, names, seen, number, optimizer)
                if p in optimizer.state:
                    state[name] = {
                        key: _describe(value, f"optimizer/{name}/{quote(str(key), safe='')}", tensors)
                        for key, value in optimizer.state[p].items()
                    }
            options = {key: _plain(value) for key, value in group.items() if key != "params"}
            groups.append({"params": [names[id(p)] for p in group["params"]], "options": options})
        described.append({"class": type(optimizer).__name__, "groups": groups, "state": state})
    return tensors, described


def collect(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = (), *, plan: Plan | None = None, rank: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a module and its optimizers that `rank` has under the plan, and the scalars `optimizers`, `tied`
    and `extra_state`."""
    tensors, described = optimizer_tensors(optimizers, module)
    scalars = {"optimizers": described, "tied": tied_names(module), "extra_state": extra_state(module)}
    every = module_tensors(module) | tensors
    return {n: t for n, t in every.items() if plan is None or holds(n, plan, rank)}, scalars


def global_shapes(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], plan: Plan, rank: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the whole, for tensors that are cut as the plan cuts their parameter; `shapes` are parameters'."""
    known = {_clean(name): shape for name, shape in shapes.items()}
    found = {}
    for name, tensor in tensors.items():
        whole = known.get(name.split("/")[1]) if name.startswith(("model/", "optimizer/")) else None
        if whole and tuple(tensor.shape) != whole and tuple(tensor.shape) == local_shape(name, whole, plan, rank):
            found[name] = whole
    return found


def merge(scalars: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """One set of scalars of what the places of the pipeline axis have, in their order: each knows the optimizer state
    of the parameters, and the extra state of the modules, that it has."""
    merged = dict(scalars[0])
    merged["optimizers"] = [dict(one) for one in merged["optimizers"]]
    for number, one in enumerate(merged["optimizers"]):
        one["state"] = {n: state for each in scalars for n, state in each["optimizers"][number]["state"].items()}
    merged["extra_state"] = {
        name: scalars[stage_rank(stages_with(f"model/{name}", plan)[0], plan)]["extra_state"][name]
        for name in merged["extra_state"]
    }
    return merged


class OptimizerLoad:
    """Saved optimizer state on its way into optimizers: fill `tensors` (empty ones by name), then `install`.

    `described` is the scalar `optimizers` of the checkpoint. Raises CheckpointError when the optimizers are not those
    that were saved: another number or class, or other parameters in their groups. `empty` makes the tensors that are
    as large as a parameter.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        module: nn.Module,
        described: Any,
        manifest: Manifest,
        plan: Plan,
        rank: int,
        empty: Empty | None = None,
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._optimizers, self._manifest, self._plan, self._rank = optimizers, manifest, plan, rank
        self._new = empty or _empty_like
        self._described = _read_described(described, manifest)
        names = {id(p): _clean(name) for name, p in module.named_parameters()}
        _check_same(optimizers, self._described, names)
        self._states = [
            {
                p: {key: self._rebuild(value, p, group, key) for key, value in one.state[names[id(p)]].items()}
                for group in optimizer.param_groups
                for p in group["params"]
                if names[id(p)] in one.state and holds(f"model/{names[id(p)]}", plan, rank)
            }
            for optimizer, one in zip(optimizers, self._described, strict=True)
        ]

    def install(self) -> None:
        """Give the optimizers the state and the saved hyperparameters, but for how they compute (`fused` ...)."""
        for optimizer, one, state in zip(self._optimizers, self._described, self._states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, saved in zip(optimizer.param_groups, one.groups, strict=True):
                for key, value in saved.options.items():
                    if isinstance(group.get(key), torch.Tensor):
                        group[key].fill_(value)
                    elif key not in _HOW:
                        group[key] = value

    def _rebuild(self, saved: Any, p: nn.Parameter, group: Mapping[str, Any], key: str) -> Any:
        match saved:
            case {"tensor": str(name)} if name in self._manifest.tensors:
                self.tensors[name] = self._empty(name, p, group, key)
                return self.tensors[name]
            case {"list": list(items)}:
                return [self._rebuild(item, p, group, key) for item in items]
            case {"tuple": list(items)}:
                return tuple(self._rebuild(item, p, group, key) for item in items)
            case {"dict": dict(items)}:
                return {k: self._rebuild(item, p, group, key) for k, item in items.items()}
            case {"value": value}:
                return value
        raise _unreadable(self._manifest, f"'{key}' is not a state")

    def _empty(self, name: str, p: nn.Parameter, group: Mapping[str, Any], key: str) -> torch.Tensor:
        entry = self._manifest.tensors[name]
        dtype = dtype_of(entry.dtype)
        shape = local_shape(name, entry.shape, self._plan, self._rank)
        is_dtensor = local_part(p) is not p
        if tuple(p.shape) == (entry.shape if is_dtensor else shape):
            return self._new(p, dtype)
        # torch keeps a step count on the CPU unless the optimizer runs in one kernel or graph
        on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
        return torch.empty(shape, dtype=dtype, device="cpu" if on_cpu else p.device)


def _empty_like(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


def install_extra_state(module: nn.Module, extra: Mapping[str, Any]) -> None:
    """The inverse of `extra_state`."""
    for name, part in module.named_modules():
        if _clean(name) in extra and _has_extra_state(part):
            part.set_extra_state(extra[_clean(name)])


def real_name(name: str) -> str:
    """A parameter's name as the module has it, from its name in the checkpoint."""
    return unquote(name)


def _clean(name: str) -> str:
    """The name in the checkpoint: a slash would end it there, so a slash in it is quoted."""
    return name.replace("_orig_mod.", "").replace("%", "%25").replace("/", "%2F")


def _passing_buffers(part: nn.Module) -> set[str]:
    return part._non_persistent_buffers_set


def _has_extra_state(part: nn.Module) -> bool:
    return type(part).get_extra_state is not nn.Module.get_extra_state


def _name_of(
    p: nn.Parameter, names: Mapping[int, str], seen: set[int], number: int, optimizer: torch.optim.Optimizer
) -> str:
    what = f"optimizer {number} ({type(optimizer).__name__})"
    if id(p) not in names:
        raise CheckpointError(
            f"{what} holds a parameter of shape {tuple(p.shape)} that is not in the model, so a checkpoint has no name "
            "for it. Build the optimizer from the model's own parameters."
        )
    if id(p) in seen:
        raise CheckpointError(
            f"{what} holds the parameter '{names[id(p)]}', which another optimizer or group holds too. "
            "Give each parameter to one optimizer."
        )
    seen.add(id(p))
    return names[id(p)]


def _describe(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The shape of a state value, its tensors handed to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_describe(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict):
        named = {k: _describe(item, f"{name}/{quote(str(k), safe='')}", tensors) for k, item in value.items()}
        return {"dict": named}
    return {"value": value}


def _plain(value: Any) -> Any:
    """A hyperparameter; one that is a tensor (a learning rate on the device) as its number."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _read_described(described: Any, manifest: Manifest) -> list[_Described]:
    try:
        return msgspec.convert(described, list[_Described])
    except msgspec.ValidationError as error:
        raise _unreadable(manifest, str(error)) from None


def _unreadable(manifest: Manifest, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of step {manifest.step} has no readable optimizer state ({why}). "
        "Load the model alone, or resume from a checkpoint that a run saved with its optimizers."
    )


def _check_same(
    optimizers: Sequence[torch.optim.Optimizer], described: Sequence[_Described], names: Mapping[int, str]
) -> None:
    here = [type(optimizer).__name__ for optimizer in optimizers]
    there = [one.name for one in described]
    if here != there:
        raise CheckpointError(
            f"the checkpoint was saved with the optimizers {there or 'none'}, the job has {here or 'none'}. "
            "Resume with the same optimizers, or start a new run."
        )
    for number, (optimizer, one) in enumerate(zip(optimizers, described, strict=True)):
        held = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
        if held != [group.params for group in one.groups]:
            raise CheckpointError(
                f"optimizer {number} ({here[number]}) has {[len(g) for g in held]} parameters in its groups, in the "
                f"checkpoint {[len(g.params) for g in one.groups]}, or others. Give it the same parameters in the same "
                "groups, or start a new run."
            )
