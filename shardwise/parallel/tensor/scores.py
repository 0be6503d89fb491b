"""Scores over a vocabulary that is cut: each rank has its columns, and the loss is computed without joining them.

What a loss usually does to scores (a cast, a view, a slice of positions, cross-entropy) is done on the local part; any
other operation joins the parts first and goes on with an ordinary tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.tensor.atoms import Ids
from shardwise.parallel.tensor.links import GroupLinks
from shardwise.parallel.tensor.parted import Parted
from shardwise.parallel.tensor.products import within


class Scores(Parted):
    """A tensor of scores [..., V] of which this rank has the columns of `ids`."""

    what = "scores"

    @classmethod
    def made(cls, local: Tensor, dim: int, ids: Ids, links: GroupLinks) -> Tensor:
        """Scores, where the cut is along the last dim; else the whole tensor."""
        return cls.of(local, dim, ids, links) if dim == local.dim() - 1 else links.join(local, dim, ids)

    def like(self, local: Tensor) -> Scores:
        """Other scores, of the same columns."""
        return Scores.of(local, local.dim() - 1, self.ids, self.links)


def _same(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    """What goes element by element, with plain numbers."""
    if any(isinstance(one, Tensor) for one in (*args, *kwargs.values())):
        return None
    return scores.like(func(scores.local, *args, **kwargs))


def _new(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    """Another tensor of the same kind, such as a loss's weight."""
    return func(scores.local, *args, **kwargs)


def _view(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    """A shape that keeps the last dim."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else args
    if not sizes or not all(isinstance(one, int) for one in sizes) or kwargs:
        return None
    leading = scores.numel() // scores.shape[-1]
    known = 1
    for one in sizes[:-1]:
        known *= one if one != -1 else 1
    last = sizes[-1] if sizes[-1] != -1 else (scores.numel() // known if -1 not in sizes[:-1] else -1)
    if last != scores.shape[-1] or (-1 not in sizes[:-1] and known != leading):
        return None
    return scores.like(scores.local.reshape(*sizes[:-1], scores.local.shape[-1]))


def _flatten(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    start = args[0] if args else kwargs.get("start_dim", 0)
    end = args[1] if len(args) > 1 else kwargs.get("end_dim", -1)
    n = scores.dim()
    if end % n == n - 1 and start % n != n - 1:
        return None
    return scores.like(scores.local.flatten(start, end))


def _getitem(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    """Slices and indices of positions."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    if any(isinstance(one, (Tensor, list)) or one is None or one is True or one is False for one in index):
        return None
    if Ellipsis in index:
        place = index.index(Ellipsis)
        gap = scores.dim() - (len(index) - 1)
        index = (*index[:place], *(slice(None),) * gap, *index[place + 1 :])
    if len(index) == scores.dim() and index[-1] != slice(None):
        return None
    return scores.like(scores.local[index])


def _log_softmax(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[0] if args else kwargs.get("dim")
    if dim is None or dim % scores.dim() != scores.dim() - 1:
        return None
    dtype = kwargs.get("dtype") or _dtype(scores, func, -1)
    local = _wide(scores.local.to(dtype))
    below = scores.links.enter(_log_sum(scores, local))  # each rank has the gradient of its own columns
    return scores.like((local - below.unsqueeze(-1)).to(dtype))


def _nll_loss(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    told = _told(("target", "weight", "size_average", "ignore_index", "reduce", "reduction"), args, kwargs)
    if not _plain(scores, told):
        return None
    dtype = _dtype(scores, func, told["target"].new_zeros(1))
    return _loss(told, -_picked(scores, _wide(scores.local.to(dtype)), told)).to(dtype)


def _cross_entropy(scores: Scores, func: Any, args: Any, kwargs: Any) -> Any:
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    told = _told(names, args, kwargs)
    if told.get("label_smoothing") or not _plain(scores, told):
        return None
    dtype = _dtype(scores, func, told["target"].new_zeros(1))
    local = _wide(scores.local.to(dtype))
    return _loss(told, _log_sum(scores, local) - _picked(scores, local, told)).to(dtype)


def _told(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _plain(scores: Scores, told: dict[str, Any]) -> bool:
    """Whether a loss is of one row a target, without class weights."""
    target = told.get("target")
    if not isinstance(target, Tensor) or target.is_floating_point() or scores.dim() != 2 or target.dim() != 1:
        return False
    known = len(target) == len(scores) and told.get("reduction", "mean") in ("none", "mean", "sum")
    return known and not any(told.get(name) is not None for name in ("weight", "size_average", "reduce"))


def _loss(told: dict[str, Any], rows: Tensor) -> Tensor:
    counted = told["target"] != told.get("ignore_index", -100)
    rows = rows.masked_fill(~counted, 0)
    reduction = told.get("reduction", "mean")
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / counted.sum()


def _log_sum(scores: Scores, local: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials over all columns."""
    top = local.detach().amax(-1) if local.shape[-1] else local.new_full(local.shape[:-1], -torch.inf)
    top = top.contiguous()
    scores.links.group.all_reduce(top, dist.ReduceOp.MAX).wait()
    top = top.masked_fill(top.isinf(), 0)
    return scores.links.total((local - top.unsqueeze(-1)).exp().sum(-1)).log() + top


def _dtype(scores: Scores, func: Any, *args: Any) -> torch.dtype:
    """In what `func` gives its result: autocast may want float32."""
    if not torch.is_autocast_enabled(scores.local.device.type):
        return scores.local.dtype
    tried: Tensor = func(scores.local.detach().new_zeros(1, 1), *args)
    return tried.dtype


def _wide(local: Tensor) -> Tensor:
    """As torch's own losses compute: half precision in float32."""
    return local.float() if local.dtype in (torch.bfloat16, torch.float16) else local


def _picked(scores: Scores, local: Tensor, told: dict[str, Any]) -> Tensor:
    """Each row's score of its target; zero where that is to be ignored."""
    target, ignored = told["target"], told.get("ignore_index", -100)
    places = torch.full((len(scores.ids) + 1,), -1, dtype=torch.int64)
    mine = torch.tensor([i for i, owner in enumerate(scores.ids) if owner == scores.links.rank], dtype=torch.int64)
    places[mine] = torch.arange(len(mine))
    outside = (target < 0) | (target >= len(scores.ids))
    within(~outside | (target == ignored), f"a target is none of the {len(scores.ids)} classes")
    place = places.to(target.device)[target.masked_fill(outside, len(scores.ids))]
    found = local.gather(-1, place.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return scores.links.total(found.masked_fill(place < 0, 0))


Scores.rules = {
    **dict.fromkeys(("float", "double", "half", "bfloat16", "to", "contiguous"), _same),
    **dict.fromkeys(("mul", "div", "__mul__", "__truediv__", "__rmul__", "tanh"), _same),
    **dict.fromkeys(("new_tensor", "new_zeros", "new_ones", "new_full", "new_empty"), _new),
    **dict.fromkeys(("view", "reshape"), _view),
    "flatten": _flatten,
    "__getitem__": _getitem,
    "log_softmax": _log_softmax,
    "nll_loss": _nll_loss,
    "cross_entropy": _cross_entropy,
}
