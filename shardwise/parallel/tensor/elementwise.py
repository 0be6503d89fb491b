"""Rules for operations that go element by element, and for those that need some dims whole: norms, softmax, sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardwise.parallel.tensor import layouts, products
from shardwise.parallel.tensor.atoms import Conflict
from shardwise.parallel.tensor.step import Step, View, argument, is_cut, labelled, shape

KEEPS = (
    *("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "expand_as"),
    *("float", "double", "half", "bfloat16", "dropout", "where", "masked_fill", "fill", "zero"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "clamp", "square", "rsub", "relu", "relu6", "leaky_relu"),
    *("gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "hardtanh", "hardswish", "hardsigmoid", "positive"),
    *("multiply", "divide", "true_divide", "subtract", "negative", "absolute"),  # other names
)


UNREAD = (IndexError, KeyError, TypeError, ValueError, AttributeError, AssertionError)  # arguments that no rule foresaw


def elementwise(view: View, node: Any) -> Step:
    """All operands are broadcast to the shape of the result."""
    whole = shape(node)
    labels = list(range(len(whole)))
    operands = []
    for operand in node.all_input_nodes:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            raise Conflict("an operand is no tensor")
        offset = len(whole) - len(shape(operand))
        operands.append(
            (operand, [d + offset if n == whole[d + offset] else None for d, n in enumerate(shape(operand))])
        )
    found = labelled(view, operands, labels)
    first = node.args[0] if node.args else None
    if found.local and writes(node) and view.cut(first) is None:
        raise Conflict("it writes into what is whole")
    chance = _chance(node)
    if found.local and chance:
        return found._replace(noise=(chance, found.out))
    return found


def writes(node: fx.Node) -> bool:
    """Whether an operation changes one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _chance(node: Any) -> float:
    """With which probability a dropout drops."""
    if getattr(node.target, "_opname", "") not in ("dropout", "dropout_"):
        return 0.0
    _, chance, training = node.args
    return float(chance) if training else 0.0


def blocked_dims(view: View, node: Any) -> Step:
    """softmax and its kin: x, dim."""
    x, dim = node.args[:2]
    n = len(shape(x))
    labels = list(range(n))
    return labelled(view, [(x, labels)], labels, blocked=[d % n for d in layouts.ints(dim)])


def normalised(view: View, node: Any) -> Step:
    """layer_norm and rms_norm: x, the last dims' shape, weight, bias."""
    x, last = node.args[:2]
    n = len(shape(x))
    labels = list(range(n))
    ends = labels[n - len(last) :]
    weights = [one for one in (*node.args[2:], *node.kwargs.values()) if isinstance(one, fx.Node)]
    return labelled(view, [(x, labels), *((one, ends) for one in weights)], labels, blocked=ends)


def reduced(view: View, node: Any) -> Step:
    """sum, mean and their kin: x, dims or none, keepdim."""
    x = node.args[0]
    n = len(shape(x))
    told = argument(node, "dim")
    dims = [d % n for d in layouts.ints(told)] if isinstance(told, (int, list, tuple)) and told != [] else range(n)
    keep = len(shape(node)) == n
    out: list[Any] = [d if d not in dims else None for d in range(n)]
    if not keep:
        out = [d for d in out if d is not None]
    name = node.target._opname
    labels = list(range(n))
    if name == "sum":
        return labelled(view, [(x, labels)], out, sums=True)
    several = isinstance(node.meta["val"], (tuple, list))
    outs = [out] * len(node.meta["val"]) if several else out
    return labelled(view, [(x, labels)], outs, blocked=list(dims), several=several)


RULES = {
    **products.RULES,
    **layouts.RULES,
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"), blocked_dims),
    **dict.fromkeys(("layer_norm", "rms_norm"), normalised),
    **dict.fromkeys(("sum", "mean", "var", "std", "amax", "amin", "norm", "linalg_vector_norm"), reduced),
    **dict.fromkeys(KEEPS, elementwise),
}


def step_of(view: View, node: Any) -> Step:
    """What `node` becomes. Raises Conflict where its operands are cut and there is no rule for that."""
    if node.op != "call_function" or not any(is_cut(view.state(one)) for one in node.all_input_nodes):
        return _whole(view, node)
    if getattr(node.target, "__name__", "") == "getitem":
        return layouts.item(view, node)
    name = str(getattr(node.target, "_opname", "?"))
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    tags = getattr(node.target, "tags", ())
    if rule is None and torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        rule = elementwise
    if rule is None:
        raise Conflict(f"there is no rule for {name}")
    try:
        return rule(view, node)
    except UNREAD as failed:
        raise Conflict(f"its rule does not take these arguments ({type(failed).__name__}: {failed})") from failed


def _whole(view: View, node: Any) -> Step:
    """Nothing is cut yet; a layer whose weight may be cut begins."""
    name = str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""
    if name in ("linear", "addmm", "mm", "matmul", "embedding", "einsum"):
        return products.RULES[name](view, node)
    several = node.op == "call_function" and isinstance(node.meta.get("val"), (tuple, list))
    return Step(out=(None,) * len(node.meta["val"]) if several else None)
