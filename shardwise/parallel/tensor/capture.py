"""One call of a module as a graph of ATen operations, above autograd and autocast, seen on tensors without numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from shardwise.models.profile import quiet

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
Shape = tuple[int, ...]


class Captured(NamedTuple):
    """`graph` takes the parameters and buffers called `names`, then the tensors among the call's arguments; it returns
    the leaves of what the call returned, which `tree` puts together."""

    graph: fx.Graph
    names: tuple[str, ...]
    constants: nn.Module
    tree: TreeSpec

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, in their order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]


class Signature(NamedTuple):
    """What of a call decides which operations run."""

    tree: TreeSpec
    leaves: tuple[Any, ...]
    training: bool
    grad: bool
    autocast: tuple[Any, ...]


def signature(module: nn.Module, args: Any, kwargs: Any) -> tuple[Signature, list[Any]]:
    """The signature of a call, and the leaves of its arguments."""
    leaves, tree = tree_flatten((args, kwargs))
    kinds = tuple((leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    casts = (
        (torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        if torch.is_autocast_enabled(device)
        else ()
    )
    return Signature(tree, kinds, module.training, torch.is_grad_enabled(), casts), leaves


def capture(module: nn.Module, args: Any, kwargs: Any, shapes: Mapping[str, Shape] | None = None) -> Captured | None:
    """The graph of `module(*args, **kwargs)`; None where its code looks at numbers, or is given what is neither a
    tensor nor plain. `shapes` are those of parameters that are cut. The module and torch's generators stay as they are.
    """
    leaves, tree = tree_flatten((args, kwargs))
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    devices = {tensor.device for tensor in state.values() if tensor.is_cuda}
    # What a checkpoint around the call, say, does with operations and saved tensors is not for those of the capture.
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.random.fork_rng(devices=list(devices)), quiet(), _disable_current_modes(), unseen:
        try:
            return _capture(module, mode, state, leaves, tree, shapes or {})
        except Exception:  # whatever the user's code does with what it is given: then this call is not captured
            return None


def _capture(
    module: nn.Module,
    mode: FakeTensorMode,
    state: Mapping[str, Tensor],
    leaves: Sequence[Any],
    tree: TreeSpec,
    shapes: Mapping[str, Shape],
) -> Captured:
    given = [_fake(mode, leaf, leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
    fakes = {name: _fake(mode, tensor, shapes.get(name, tensor.shape)) for name, tensor in state.items()}
    memo: dict[int, Any] = {id(tensor): fakes[name] for name, tensor in state.items()}
    twin = copy.deepcopy(module, memo)
    found: list[TreeSpec] = []

    def run(*tensors: Tensor) -> list[Any]:
        ours, theirs = tensors[: len(fakes)], iter(tensors[len(fakes) :])
        args, kwargs = tree_unflatten([next(theirs) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
        output = functional_call(twin, dict(zip(fakes, ours, strict=True)), args, kwargs)
        flat, spec = tree_flatten(output)
        found.append(spec)
        return flat

    with mode:
        traced = make_fx(run, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
            *fakes.values(), *given
        )
    traced.graph.eliminate_dead_code(_impure)
    return Captured(traced.graph, tuple(fakes), traced, found[-1])


def _fake(mode: FakeTensorMode, tensor: Tensor, shape: Shape) -> Tensor:
    with mode:
        if tuple(shape) == tuple(tensor.shape):
            made = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        else:
            made = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)


def _impure(node: fx.Node) -> bool:
    """What must stay though nobody reads it: what writes, and what draws random numbers."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function" and getattr(node.target, "__name__", "") != "getitem"
    return bool(schema.is_mutable) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
