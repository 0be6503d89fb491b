"""A tensor of which each rank has a part, for code that knows nothing of that: whatever reads it gets it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shardwise.errors import JobError
from shardwise.parallel.tensor.atoms import Ids
from shardwise.parallel.tensor.links import GroupLinks

Rule = Callable[[Any, Any, Any, Any], Any]


class Parted(Tensor):
    """The whole of `local`, this rank's indices `ids` of `dim`. Every function is given the joined tensor, except those
    that `rules` has an answer for. What writes into it raises JobError: the write would be lost."""

    local: Tensor
    split_dim: int
    ids: Ids
    links: GroupLinks
    what: ClassVar[str] = "a parameter"
    rules: ClassVar[dict[str, Rule]] = {}

    @classmethod
    def of(cls, local: Tensor, dim: int, ids: Ids, links: GroupLinks) -> Self:
        """The wrapped tensor; its gradient, which is whole and alike on all ranks, becomes that of `local`."""
        made: Self = _Wrap.apply(local, cls, dim, ids, links)
        return made

    def whole(self) -> Tensor:
        """The joined tensor. Collective. While gradients are recorded neither it nor a view of it can be written into,
        which the parts would miss: torch refuses that for one of several views."""
        joined = self.links.join(self.local, self.split_dim, self.ids)
        return joined.unsqueeze(0).unbind(0)[0]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, local={tuple(self.local.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if asks_about(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, Parted):
            if _writes(name):
                raise written(first.what, name)
            rule = type(first).rules.get(name)
            found = rule(first, func, args[1:], kwargs) if rule is not None else None
            if found is not None:
                return found
        if isinstance(kwargs.get("out"), Parted):
            raise written(kwargs["out"].what, f"{name}(out=...)")
        args, kwargs = tree_map(lambda one: one.whole() if isinstance(one, Parted) else one, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # what hooks have saved for backward comes back so
            one = args[0]
            made: Parted = Tensor._make_wrapper_subclass(type(one), one.shape, dtype=one.dtype, device=one.device)
            vars(made).update(vars(one))
            return made
        raise RuntimeError(f"{func} reached a tensor that is cut over ranks below torch's functions.")


ABOUT = frozenset(
    ("size", "stride", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "__len__")
)
PROPERTIES = frozenset(
    getattr(Tensor, name) for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_sparse")
)


def asks_about(func: Any) -> bool:
    """Whether a function looks at a tensor's shape and kind alone, not at its numbers."""
    name = getattr(func, "__name__", "")
    return name in ABOUT or (name == "__get__" and getattr(func, "__self__", None) in PROPERTIES)


def written(what: str, by: str) -> JobError:
    """The error for code that writes into what is cut."""
    return JobError(
        f"{by} writes in place into {what} cut over the tensor ranks, which would be lost. Compute a new one instead "
        "(torch.where, masked_fill, a product), or keep the layer whole by splits of the plan, such as "
        "{'lm_head': 'whole'}."
    )


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or name in INPLACE
    return name.endswith("_") and not name.startswith("requires_grad")


INPLACE = frozenset(
    f"__i{one}__"
    for one in ("add", "sub", "mul", "truediv", "floordiv", "div", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
)


class _Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, kind: type[Parted], dim: int, ids: Ids, links: GroupLinks) -> Parted:
        ctx.dim, ctx.ids, ctx.links = dim, ids, links
        shape = [len(ids) if d == dim else n for d, n in enumerate(local.shape)]
        made: Parted = Tensor._make_wrapper_subclass(kind, shape, dtype=local.dtype, device=local.device)
        made.local, made.split_dim, made.ids, made.links = local, dim, ids, links
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.links.take(ctx.links.enter(grad), ctx.dim, ctx.ids), None, None, None, None
