"""Rules for operations that multiply and sum: linear layers, matrix products, attention, embeddings, convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.parallel.tensor.atoms import Conflict, Cut, Ids, Span, spans
from shardwise.parallel.tensor.step import Call, Step, View, counts, labelled, shape

aten = torch.ops.aten


def linear(view: View, node: Any) -> Step:
    """x [..., i], weight [o, i], bias [o] -> [..., o]."""
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    lead = [f"x{d}" for d in range(len(shape(x)) - 1)]
    preset = _column(view, x, weight, 0, "o")
    operands: list[Any] = [(x, [*lead, "i"]), (weight, ["o", "i"])]
    if _summed(view, [(x, len(lead)), (weight, 1)]):
        bare = _instead(node.target, x, weight)
        return labelled(view, operands, [*lead, "o"], sums=True, call=bare, addend=bias)
    if bias is not None:
        operands.append((bias, ["o"]))
    return labelled(view, operands, [*lead, "o"], preset=preset)


def addmm(view: View, node: Any) -> Step:
    """bias [o] or [m, o], x [m, i], weight [i, o]: beta and alpha are 1 where it sums."""
    bias, x, weight = node.args
    preset = _column(view, x, weight, 1, "o")
    operands: list[Any] = [(x, ["m", "i"]), (weight, ["i", "o"])]
    if _summed(view, [(x, 1), (weight, 0)]):
        if node.kwargs:
            raise Conflict("it scales what it adds")
        bare = _instead(aten.mm.default, x, weight)
        return labelled(view, operands, ["m", "o"], sums=True, call=bare, addend=bias)
    added = _broadcast(shape(bias), shape(node), ["m", "o"])
    return labelled(view, [*operands, (bias, added)], ["m", "o"], preset=preset)


def matmul(view: View, node: Any) -> Step:
    """a [..., m, k] and b [..., k, n], or either of them a vector."""
    a, b = node.args
    lead = [f"b{d}" for d in range(max(len(shape(a)), len(shape(b)), 2) - 2)]
    whole = [*lead, "m", "n"]
    left = [*_broadcast(shape(a)[:-2], shape(node)[: len(lead)], lead), "m", "k"] if len(shape(a)) > 1 else ["k"]
    right = [*_broadcast(shape(b)[:-2], shape(node)[: len(lead)], lead), "k", "n"] if len(shape(b)) > 1 else ["k"]
    out = [label for label in whole if label in (*left, *right) or label in lead]
    preset = _column(view, a, b, 1, "n") if len(shape(b)) == 2 else None
    return labelled(view, [(a, left), (b, right)], out, sums=True, preset=preset)


def bmm(view: View, node: Any) -> Step:
    return labelled(view, [(node.args[0], ["b", "m", "k"]), (node.args[1], ["b", "k", "n"])], "bmn", sums=True)


def baddbmm(view: View, node: Any) -> Step:
    added, a, b = node.args
    operands = [(a, ["b", "m", "k"]), (b, ["b", "k", "n"]), (added, _broadcast(shape(added), shape(node), "bmn"))]
    return labelled(view, operands, "bmn")


def einsum(view: View, node: Any) -> Step:
    """An equation without dots."""
    equation, operands = node.args[0], node.args[1]
    left, arrow, out = str(equation).replace(" ", "").partition("->")
    if not arrow or "." in left:
        if any(view.cut(one) is not None for one in operands):
            raise Conflict("its equation is not written out")
        return Step()
    terms = left.split(",")
    preset = None
    if len(terms) == 2:  # a weight whose heads are a dim of it
        begun = [d for d, label in enumerate(terms[1]) if label in out and label not in terms[0]]
        if begun and begun[0] < 2:
            preset = _column(view, operands[0], operands[1], begun[0], terms[1][begun[0]])
    return labelled(view, list(zip(operands, terms, strict=True)), out, sums=True, preset=preset)


def attention(view: View, node: Any) -> Step:
    """scaled_dot_product_attention over heads: q [..., h, l, e], k and v [..., h, s, e], mask broadcast to h, l, s."""
    given = arguments_of_attention(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    rank = len(shape(query))
    lead = [f"b{d}" for d in range(rank - 2)]
    if shape(query)[:-2] != shape(key)[:-2]:
        return _grouped(view, node, given)
    blocked = ["l", "s", "e", "f"]
    operands: list[Any] = [(query, [*lead, "l", "e"]), (key, [*lead, "s", "e"]), (value, [*lead, "s", "f"])]
    if mask is not None:
        whole = (*shape(query)[:-2], shape(query)[-2], shape(key)[-2])
        operands.append((mask, _broadcast(shape(mask), whole, [*lead, "l", "s"])))
    found = labelled(view, operands, [*lead, "l", "f"], blocked=blocked)
    return _with_dropout(found, node, given)


def _grouped(view: View, node: Any, given: dict[str, Any]) -> Step:
    """Several query heads for each head of keys and values (Ainslie et al. 2023)."""
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    dim = len(shape(query)) - 3
    times = shape(query)[dim] // max(1, shape(key)[dim])
    cuts = {each: cut for each in (query, key, value) if (cut := view.cut(each)) is not None}
    if any(cut.dim != dim for cut in cuts.values()) or not times:
        raise Conflict("attention is cut over heads only")
    by_head = mask is not None and len(shape(mask)) == len(shape(query)) and shape(mask)[dim] > 1
    if key not in cuts and value not in cuts:
        if query not in cuts or by_head or given["dropout_p"]:
            raise Conflict("its keys are whole, and its mask is not")
        return _few_keys(node, given, cuts[query], times)
    ids = next(cut.ids for each, cut in cuts.items() if each is not query)
    every = {query: _times(ids, times), key: ids, value: ids}
    if by_head:
        every[mask] = every[query]
    for each in every:
        if (cut := view.cut(each)) is not None:
            view.numbers.same(cut.ids, every[each])
    wants = {each: Cut(dim, every[each]) for each in every if view.cut(each) is None}
    return _with_dropout(Step(out=Cut(dim, every[query]), wants=wants), node, given)


def _few_keys(node: Any, given: dict[str, Any], cut: Cut, times: int) -> Step:
    """Fewer heads of keys than ranks, whole everywhere: each rank takes those of its queries' heads."""

    def call(rank: int) -> Call:
        heads = [head // times for head, owner in enumerate(cut.ids) if owner == rank]
        operands = (given["query"], given["key"], given["value"], given["attn_mask"])
        return attend_few, (*operands, cut.dim, heads, bool(given["is_causal"]), given["scale"]), {}

    return Step(out=cut, call=call)


def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dim: int,
    heads: Sequence[int],
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of each head of `query` on one of `heads` of the keys and values."""
    index = torch.tensor(heads, device=key.device)
    keys, values = key.index_select(dim, index), value.index_select(dim, index)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, 0.0, causal, scale=scale)


def arguments_of_attention(node: Any) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return {**dict.fromkeys(names), **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _with_dropout(found: Step, node: fx.Node, given: dict[str, Any]) -> Step:
    """The mask of the whole attention is drawn on every rank, so what was one operation is written out."""
    chance = given["dropout_p"] or 0.0
    if not found.local or not chance:
        return found
    return found._replace(noise=(chance, found.out))


def embedding(view: View, node: Any) -> Step:
    """weight [v, e], indices [...] -> [..., e]; rows that a rank does not have count as zeros."""
    weight, indices = node.args[:2]
    lead = [f"x{d}" for d in range(len(shape(indices)))]
    rest = (*node.args[2:], *node.kwargs.values())
    if any(option not in (-1, False) for option in rest[1:]):
        if view.cut(weight) is not None or view.cut(indices) is not None:
            raise Conflict("an embedding with sparse or scaled gradients is not cut")
        return Step()
    preset = _column(view, indices, weight, 0, "v")

    def call(label: Any) -> Any:
        if label != "v":
            return None
        cut = view.cut(weight)
        assert cut is not None
        padding = rest[0] if rest else -1
        return lambda rank: (local_rows, (weight, indices, spans(cut.ids, rank), padding, len(cut.ids)), {})

    return labelled(view, [(weight, ["v", "e"]), (indices, lead)], [*lead, "e"], sums=True, preset=preset, call=call)


def local_rows(weight: Tensor, indices: Tensor, held: Sequence[Span], padding: int, total: int) -> Tensor:
    """An embedding's rows, of those that `weight` has, and zeros for the others. Raises IndexError for an index that
    is none of the `total` rows, on all ranks."""
    within((indices >= 0) & (indices < total), f"an index is none of the {total} rows of an embedding")
    place = torch.full_like(indices, -1)
    at, padded = 0, -1
    for first, stop in held:
        inside = (indices >= first) & (indices < stop)
        place = torch.where(inside, indices - first + at, place)
        padded = padding - first + at if first <= padding < stop else padded
        at += stop - first
    away = place < 0
    found = torch.embedding(weight, place.clamp(min=0), padded)
    return found.masked_fill(away.unsqueeze(-1), 0)


def within(inside: Tensor, message: str) -> None:
    """Raise IndexError where an index is not inside; on a GPU when the kernels get there, as torch does."""
    if inside.is_cuda:
        torch._assert_async(inside.all(), message)
    elif not inside.all():
        raise IndexError(f"{message[0].upper()}{message[1:]}.")


def conv(view: View, node: Any) -> Step:
    """x [b, i, ...], weight [o, i, ...], bias [o]; or depthwise, with a filter for each channel."""
    given: Any = (*node.args, *(None,) * (3 - len(node.args)))
    x, weight, bias = given[:3]
    groups = given[6] if len(given) > 6 else node.kwargs.get("groups", 1)
    n = len(shape(x)) - 2
    space, filtered = [f"s{d}" for d in range(n)], [f"t{d}" for d in range(n)]
    added = [(bias, ["o"])] if bias is not None else []
    if groups == 1 and not _summed(view, [(x, 1), (weight, 1)]):
        operands: list[Any] = [(x, ["b", "i", *space]), (weight, ["o", "i", *([None] * n)]), *added]
        return labelled(view, operands, ["b", "o", *filtered])
    if groups != shape(x)[1] or groups != shape(weight)[0] or groups == 1:
        raise Conflict("a convolution is cut along its outputs, or channel by channel")
    operands = [(x, ["b", "o", *space]), (weight, ["o", None, *([None] * n)]), *added]
    defaults = (1, [0] * n, [1] * n)
    options = (*given[3:6], *defaults[len(given[3:6]) :])

    def call(label: Any) -> Any:
        cut = view.cut(x) or view.cut(weight)
        if label != "o" or cut is None:
            return None
        return lambda rank: (node.target, (x, weight, bias, *options, counts(cut.ids)(rank)), {})

    return labelled(view, operands, ["b", "o", *filtered], call=call)


def _instead(target: Any, *args: Any) -> Callable[[Any], Callable[[int], Call]]:
    """What runs in the place of a node, whichever dim is cut."""
    return lambda label: lambda rank: (target, args, {})


def _column(view: View, x: Any, weight: Any, dim: int, label: str) -> dict[Any, Ids] | None:
    if not isinstance(weight, fx.Node) or view.cut(x) is not None or view.cut(weight) is not None:
        return None
    ids = view.column(weight, dim)
    return {label: ids} if ids is not None else None


def _summed(view: View, dims: list[tuple[Any, int]]) -> bool:
    return any((cut := view.cut(operand)) is not None and cut.dim == dim for operand, dim in dims)


def _broadcast(small: Any, whole: Any, labels: Any) -> list[Any]:
    """The names of the dims of a tensor that is broadcast to `whole`."""
    ends = list(zip(reversed(small), reversed(whole), reversed(labels), strict=False))
    return [label if size == full else None for size, full, label in reversed(ends)]


def _times(ids: Ids, times: int) -> Ids:
    return tuple(one for one in ids for _ in range(times))


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, noise: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """scaled_dot_product_attention written out, with a given dropout mask; as torch's own on a CPU does it."""
    kind = noise.dtype
    query, key, value, dtype = query.to(kind), key.to(kind), value.to(kind), query.dtype
    times = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
    if times > 1:
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    root = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    scores = (query * root) @ (key * root).transpose(-1, -2)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    nothing = (scores == -math.inf).all(-1, keepdim=True)  # a row that may look nowhere gives zeros
    found = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return ((found * noise) @ value).to(dtype)


RULES = {
    "linear": linear,
    "addmm": addmm,
    "mm": matmul,
    "matmul": matmul,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "embedding": embedding,
    "conv1d": conv,
    "conv2d": conv,
    "convolution": conv,
}
