"""One call of a module as a graph of ATen operations, above autograd and autocast, seen on tensors without numbers."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from shardwise.errors import JobError
from shardwise.models.profile import quiet
from shardwise.parallel.tensor.guards import HOOKS, Held, Watched, attributes, hooked, python_draws

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
    state: tuple[Any, ...]
    grad: bool
    autocast: tuple[Any, ...]


def signature(parts: Sequence[nn.Module], args: Any, kwargs: Any) -> tuple[Signature, list[Any]]:
    """The signature of a call of the first of `parts`, which are all modules in it, and the leaves of its arguments."""
    leaves, tree = tree_flatten((args, kwargs))
    kinds = tuple((leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    casts = (
        (torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        if torch.is_autocast_enabled(device)
        else ()
    )
    return Signature(tree, kinds, attributes(parts), torch.is_grad_enabled(), casts), leaves


def capture(module: nn.Module, args: Any, kwargs: Any, shapes: Mapping[str, Shape] | None = None) -> Captured | None:
    """The graph of `module(*args, **kwargs)`; None where its code looks at numbers, changes what it or Python's and
    numpy's generators hold, has hooks inside, or is given what is neither a tensor nor plain.

    `shapes` are those of parameters that are cut. The module and all generators stay as they are. Raises JobError where
    its code keeps one of the tensors without numbers (caches of functools apart, which are cleared then).
    """
    leaves, tree = tree_flatten((args, kwargs))
    if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves) or hooked(module):
        return None
    mode = _Counted()
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    devices = {tensor.device for tensor in state.values() if tensor.is_cuda}
    # What a checkpoint around the call, say, does with operations and saved tensors is not for those of the capture.
    # Nothing is saved either: the capture has no backward, and a node that packs its own output never dies.
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    still = torch.random.fork_rng(devices=list(devices))
    with still, quiet(), _disable_current_modes(), unseen, python_draws() as drawn:
        try:
            found = _capture(module, mode, state, leaves, tree, shapes or {})
        except Exception:  # whatever the user's code does with what it is given: then this call is not captured
            found = None
        found = None if drawn() else found
    if not mode.left(found):
        return found
    found = None
    for cache in gc.get_objects():
        if type(cache) is functools._lru_cache_wrapper:  # its next call fills it with what has numbers
            cache.cache_clear()
    if mode.left(None):
        raise JobError(
            f"{type(module).__name__} keeps a tensor that it made when its operations were recorded, outside of the "
            "module. Make it a buffer, or compute it each time; or keep the layer whole: splits of the plan."
        )
    return None


def _capture(
    module: nn.Module,
    mode: FakeTensorMode,
    state: Mapping[str, Tensor],
    leaves: Sequence[Any],
    tree: TreeSpec,
    shapes: Mapping[str, Shape],
) -> Captured | None:
    given = [_fake(mode, leaf, leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
    fakes = {name: _fake(mode, tensor, shapes.get(name, tensor.shape)) for name, tensor in state.items()}
    memo: dict[int, Any] = {id(tensor): fakes[name] for name, tensor in state.items()}
    plain = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    memo |= {id(tensor): tensor for tensor in plain}
    twin = copy.deepcopy(module, memo)
    for hooks in HOOKS:
        vars(twin)[hooks].clear()  # whoever calls the module runs its hooks
    before = Held(twin)
    found: list[TreeSpec] = []
    watched = Watched(twin)

    def run(*tensors: Tensor) -> list[Any]:
        ours, theirs = tensors[: len(fakes)], iter(tensors[len(fakes) :])
        args, kwargs = tree_unflatten([next(theirs) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
        named = {f"part.{name}": tensor for name, tensor in zip(fakes, ours, strict=True)}
        output = functional_call(watched, named, (args, kwargs))
        flat, spec = tree_flatten(output)
        found.append(spec)
        return flat

    with mode:
        traced = make_fx(run, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
            *fakes.values(), *given
        )
        if watched.replaced or Held(twin) != before:
            return None
        every = {node: tree_map(_detached, node.meta.get("val")) for node in traced.graph.nodes}
    traced.graph.eliminate_dead_code(impure)
    for node in every:  # their own would keep autograd's graph of the capture
        node.meta = {}
    for node in traced.graph.nodes:
        node.meta["val"] = every[node]
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


def _detached(leaf: Any) -> Any:
    if isinstance(leaf, tuple):  # torch.return_types
        return tuple(map(_detached, leaf))
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def impure(node: fx.Node) -> bool:
    """What must stay though nobody reads it: what writes, and what draws random numbers."""
    if node.op in ("placeholder", "output", "call_method"):  # a collective, in which every rank takes part
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function" and getattr(node.target, "__name__", "") != "getitem"
    return bool(schema.is_mutable) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Counted(FakeTensorMode):
    """Knows which of its tensors outlive the capture."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._made: list[weakref.ref[Tensor]] = []

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().dispatch(func, types, args, kwargs)
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        return found

    def left(self, found: Captured | None) -> bool:
        """Whether any is alive that the graph does not need."""
        nodes = found.graph.nodes if found is not None else ()
        known = {id(leaf) for node in nodes for leaf in tree_leaves(list(node.meta.values()))}
        if self._alive(known):
            gc.collect()  # modules, graphs and errors are in cycles
        return self._alive(known)

    def _alive(self, known: set[int]) -> bool:
        return any((made := one()) is not None and id(made) not in known for one in self._made)
