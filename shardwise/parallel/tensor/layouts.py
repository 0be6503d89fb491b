"""Rules for operations that only lay numbers out anew: views, transposes, splits, slices, repeats."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import torch

from shardwise.parallel.tensor.atoms import Conflict, Cut, Ids
from shardwise.parallel.tensor.step import State, Step, View, argument, counts, labelled, shape


def reshape(view: View, node: Any) -> Step:
    """Both shapes are products of the same factors, and the cut follows one factor."""
    x = node.args[0]
    cut = view.cut(x)
    if cut is None:
        return Step()
    before, after = shape(x), shape(node)
    inner, outer = factors(before, after)
    mine = inner[cut.dim]
    sizes = [size for size, _ in mine]
    place = _place(view, node, cut.ids, sizes)
    kept = _along(cut.ids, sizes, place)
    name = mine[place][1]
    dim = next((d for d, group in enumerate(outer) if any(one == name for _, one in group)), None)
    if dim is None:
        raise Conflict("the dim is gone")
    spread = [range(size) if one == name else [None] * size for size, one in outer[dim]]
    ids = tuple(
        kept[next(i for i in where if i is not None)] if any(i is not None for i in where) else 0
        for where in itertools.product(*spread)
    )
    size = counts(ids)
    full = list(after)

    def call(rank: int) -> Any:
        return torch.ops.aten.reshape.default, (x, [size(rank) if d == dim else n for d, n in enumerate(full)]), {}

    return Step(out=Cut(dim, ids), call=call)


Group = list[tuple[int, int]]  # (size, number of the factor)


def factors(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[list[Group], list[Group]]:
    """The factors of each dim of two shapes of one tensor, such that both are products of the same ones.

    Dims that have no such factors (3 x 4 read as 4 x 3) have some of their own, which the other shape has not.
    """
    inner: list[Group] = [[] for _ in before]
    outer: list[Group] = [[] for _ in after]
    left = [(dim, size) for dim, size in enumerate(before) if size != 1]
    right = [(dim, size) for dim, size in enumerate(after) if size != 1]
    number = 0
    while left and right:
        (i, a), (j, b) = left.pop(0), right.pop(0)
        size = min(a, b)
        if size == 0:
            raise Conflict("it has no elements")
        if max(a, b) % size:  # further dims, until both have as many elements: their factors are their own
            one, two = [(i, a)], [(j, b)]
            while (here := prod(n for _, n in one)) != (there := prod(n for _, n in two)):
                one, two = (one, [*two, right.pop(0)]) if here > there else ([*one, left.pop(0)], two)
            for groups, dims in ((inner, one), (outer, two)):
                for dim, n in dims:
                    groups[dim].append((n, number))
                    number += 1
            continue
        inner[i].append((size, number))
        outer[j].append((size, number))
        number += 1
        if a > size:
            left.insert(0, (i, a // size))
        if b > size:
            right.insert(0, (j, b // size))
    return inner, outer


def _place(view: View, node: Any, ids: Ids, sizes: list[int]) -> int:
    """Which factor of a dim the cut follows; where several may, the view chooses, and joins what must be."""
    if not sizes:
        raise Conflict("the dim has one index")
    if len(sizes) == 1:
        return 0
    options = [p for p, size in enumerate(sizes) if size > 1]
    for place in options:
        kept = _along(ids, sizes, place)
        if view.numbers.alike(ids, _spread(kept, sizes, place)):
            return place
    options = [p for p in options if sizes[p] >= view.ranks]
    if not options:
        raise Conflict("there are fewer parts than ranks")
    place = options[view.choose(node, len(options))]
    view.numbers.same(ids, _spread(_along(ids, sizes, place), sizes, place))
    return place


def _along(ids: Ids, sizes: list[int], place: int) -> Ids:
    """The numbers along one factor, at the first index of the others."""
    step = 1
    for size in sizes[place + 1 :]:
        step *= size
    return tuple(ids[index * step] for index in range(sizes[place]))


def _spread(kept: Ids, sizes: list[int], place: int) -> Ids:
    inner = outer = 1
    for size in sizes[place + 1 :]:
        inner *= size
    for size in sizes[:place]:
        outer *= size
    return tuple(one for one in kept for _ in range(inner)) * outer


def permute(view: View, node: Any) -> Step:
    x = node.args[0]
    n = len(shape(x))
    name = node.target._opname
    order = list(range(n))
    if name == "permute":
        order = [d % n for d in node.args[1]]
    elif name in ("transpose", "swapaxes", "swapdims"):
        a, b = node.args[1] % n, node.args[2] % n
        order[a], order[b] = b, a
    elif n > 1:
        order[-1], order[-2] = n - 2, n - 1
    return labelled(view, [(x, list(range(n)))], order)


def movedim(view: View, node: Any) -> Step:
    x, source, target = node.args
    n = len(shape(x))
    moved = {t % n: s % n for s, t in zip(ints(source), ints(target), strict=True)}
    rest = iter(d for d in range(n) if d not in moved.values())
    return labelled(view, [(x, list(range(n)))], [moved[d] if d in moved else next(rest) for d in range(n)])


def unsqueeze(view: View, node: Any) -> Step:
    x, dim = node.args
    labels: list[Any] = list(range(len(shape(x))))
    out = list(labels)
    out.insert(dim % (len(labels) + 1), None)
    return labelled(view, [(x, labels)], out)


def squeeze(view: View, node: Any) -> Step:
    x = node.args[0]
    n = len(shape(x))
    dims = [d % n for d in ints(node.args[1])] if len(node.args) > 1 else range(n)
    gone = [d for d in dims if shape(x)[d] == 1]
    labels = list(range(n))
    return labelled(view, [(x, labels)], [d for d in labels if d not in gone], blocked=gone)


def expand(view: View, node: Any) -> Step:
    x, sizes, *rest = node.args
    extra = len(sizes) - len(shape(x))
    labels = [d + extra if shape(x)[d] == shape(node)[d + extra] else None for d in range(len(shape(x)))]

    def call(label: Any) -> Any:
        changed = [-1 if d == label else n for d, n in enumerate(sizes)]
        return lambda rank: (node.target, (x, changed, *rest), node.kwargs)

    return labelled(view, [(x, labels)], list(range(len(shape(node)))), call=call)


def pieces(view: View, node: Any) -> Step:
    """split, chunk, unbind and their kin: several results."""
    x = node.args[0]
    lengths = [value.shape for value in node.meta["val"]]
    name = node.target._opname
    dim = _dim_of(node, 1 if name == "unbind" else 2) % len(shape(x))
    labels = list(range(len(shape(x))))
    if name == "unbind":
        out = [d for d in labels if d != dim]
        return labelled(view, [(x, labels)], [out] * len(lengths), blocked=[dim], several=True)
    cut = view.cut(x)
    if cut is None or cut.dim != dim:
        return labelled(view, [(x, labels)], [labels] * len(lengths), several=True)
    ends = [0, *itertools.accumulate(one[dim] for one in lengths)]
    found = [cut.ids[a:b] for a, b in itertools.pairwise(ends)]

    def call(rank: int) -> Any:
        return torch.split, (x, [counts(ids)(rank) for ids in found], dim), {}

    return Step(out=tuple(Cut(dim, ids) for ids in found), call=call)


def slice_(view: View, node: Any) -> Step:
    told: Any = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    x, dim, start, stop, step = told
    n = len(shape(x))
    dim = dim % n
    cut = view.cut(x)
    if cut is None or cut.dim != dim:
        return labelled(view, [(x, list(range(n)))], list(range(n)))
    first, last, stride = slice(start, stop, step).indices(shape(x)[dim])
    if stride != 1:
        raise Conflict("a slice with steps")
    last = max(first, last)
    before, kept = cut.ids[:first], cut.ids[first:last]

    def call(rank: int) -> Any:
        at = counts(before)(rank)
        return node.target, (x, dim, at, at + counts(kept)(rank)), {}

    return Step(out=Cut(dim, kept), call=call)


def narrow(view: View, node: Any) -> Step:
    x, dim, start, length = node.args
    cut = view.cut(x)
    n = len(shape(x))
    dim = dim % n
    if cut is None or cut.dim != dim:
        return labelled(view, [(x, list(range(n)))], list(range(n)))
    start = start % shape(x)[dim] if start < 0 else start
    before, kept = cut.ids[:start], cut.ids[start : start + length]
    return Step(
        out=Cut(dim, kept),
        call=lambda rank: (node.target, (x, dim, counts(before)(rank), counts(kept)(rank)), {}),
    )


def select(view: View, node: Any) -> Step:
    x = node.args[0]
    n = len(shape(x))
    dim = node.args[1] % n
    return labelled(view, [(x, list(range(n)))], [d for d in range(n) if d != dim], blocked=[dim])


def cat(view: View, node: Any) -> Step:
    given = list(node.args[0])
    n = len(shape(node))
    dim = _dim_of(node, 1) % n
    cuts = [view.cut(one) for one in given]
    if any(cut is not None and cut.dim == dim for cut in cuts):
        if not all(cut is not None and cut.dim == dim for cut in cuts):
            raise Conflict("it joins parts with what is whole")
        return Step(out=Cut(dim, tuple(one for cut in cuts if cut is not None for one in cut.ids)))
    labels: list[Any] = [d if d != dim else None for d in range(n)]
    return labelled(view, [(one, labels) for one in given], labels)


def stack(view: View, node: Any) -> Step:
    given = list(node.args[0])
    n = len(shape(node))
    dim = _dim_of(node, 1) % n
    labels = list(range(n - 1))
    return labelled(view, [(one, labels) for one in given], [*labels[:dim], None, *labels[dim:]])


def repeat_interleave(view: View, node: Any) -> Step:
    x, times, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim")
    n = len(shape(x))
    if view.cut(x) is None:
        return Step()
    if not isinstance(times, int) or not isinstance(dim, int):
        raise Conflict("it repeats unevenly")
    cut = view.cut(x)
    assert cut is not None
    if cut.dim != dim % n:
        return labelled(view, [(x, list(range(n)))], list(range(n)))
    out = Cut(cut.dim, tuple(one for one in cut.ids for _ in range(times)))
    return Step(out=out, call=lambda rank: (node.target, (x, times, cut.dim), {}))  # its length is the rank's own


def repeat(view: View, node: Any) -> Step:
    x, times = node.args
    extra = len(times) - len(shape(x))
    labels = [d + extra if times[d + extra] == 1 else None for d in range(len(shape(x)))]
    return labelled(view, [(x, labels)], list(range(len(shape(node)))))


def along(view: View, node: Any) -> Step:
    """roll and flip: whole along the dims that they are told, and all of them where they are told none."""
    x = node.args[0]
    n = len(shape(x))
    labels = list(range(n))
    where = argument(node, "dims") or labels
    return labelled(view, [(x, labels)], labels, blocked=[d % n for d in ints(where)])


def picked(view: View, node: Any) -> Step:
    """index_select and gather: whole along the dim in which they pick, and wherever their index is shorter."""
    x, dim, index = node.args[:3]
    n = len(shape(x))
    labels = list(range(n))
    if node.target._opname == "index_select":
        return labelled(view, [(x, labels)], labels, blocked=[dim % n])
    blocked = [d for d in labels if d == dim % n or shape(x)[d] != shape(index)[d]]
    return labelled(view, [(x, labels), (index, labels)], labels, blocked=blocked)


def pad(view: View, node: Any) -> Step:
    x, widths = node.args[:2]
    n = len(shape(x))
    labels = list(range(n))
    return labelled(view, [(x, labels)], labels, blocked=[n - 1 - i // 2 for i, width in enumerate(widths) if width])


def item(view: View, node: Any) -> Step:
    state: State = view.state(node.args[0])
    index = node.args[1]
    return Step(out=state[index] if isinstance(state, tuple) else None)


def _dim_of(node: Any, place: int) -> int:
    found = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    assert isinstance(found, int)
    return found


def ints(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


RULES = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias"), reshape
    ),
    **dict.fromkeys(("permute", "transpose", "t", "swapaxes", "swapdims", "numpy_T", "mT"), permute),
    "movedim": movedim,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split"), pieces),
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(("index_select", "gather"), picked),
    "repeat_interleave": repeat_interleave,
    "repeat": repeat,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("roll", "flip"), along),
}
