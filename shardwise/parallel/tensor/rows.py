"""A table of experts [E, ...] of which a rank has some rows: what the module's code sees instead of the whole.

It stands for the table with zeros in the rows of other ranks. Products with one of those rows are zero and are not
computed, products with all rows at once are computed for this rank's alone, and anything else works on the table filled
up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shardwise.parallel.tensor.atoms import spans
from shardwise.parallel.tensor.parted import asks_about

TURNS = frozenset((Tensor.mT, Tensor.T))
PRODUCTS = frozenset(("linear", "matmul", "__matmul__", "mm"))
CASTS = frozenset(("float", "double", "half", "bfloat16", "to", "type_as", "contiguous", "detach", "clone"))


class Standin(Tensor):
    """A tensor without numbers of its own: every use goes through `use`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if asks_about(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return use(getattr(func, "__name__", ""), func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} reached a table of experts below torch's functions.")

    def filled(self) -> Tensor:
        """An ordinary tensor, with zeros where this rank has nothing."""
        raise NotImplementedError

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)})"


class Nothing(Standin):
    """The weight of another rank's expert: zeros, or NaN where it is to be seen what depends on it."""

    value: float

    @staticmethod
    def of(shape: Sequence[int], like: Tensor, value: float = 0.0) -> Nothing:
        """`value` in that shape."""
        made: Nothing = Tensor._make_wrapper_subclass(Nothing, tuple(shape), dtype=like.dtype, device=like.device)
        made.value = value
        return made

    def filled(self) -> Tensor:
        return torch.full((), self.value, dtype=self.dtype, device=self.device).expand(self.shape)


class Rows(Standin):
    """The table of which this rank has `local`, the rows whose numbers in the whole are `mine`."""

    local: Tensor
    mine: tuple[int, ...]
    uses: set[str]  # "any": the table was used; "own": of it what this rank has

    @staticmethod
    def of(local: Tensor, mine: tuple[int, ...], length: int, uses: set[str] | None = None) -> Rows:
        """The table of `length` rows."""
        made: Rows = Tensor._make_wrapper_subclass(
            Rows, (length, *local.shape[1:]), dtype=local.dtype, device=local.device
        )
        made.local, made.mine, made.uses = local, mine, uses if uses is not None else set()
        return made

    def like(self, local: Tensor) -> Rows:
        """The same rows of another table."""
        return Rows.of(local, self.mine, self.shape[0], self.uses)

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """Of `x` the indices of `dim` that this rank has."""
        first, stop = self.mine[0], self.mine[-1] + 1
        if stop - first == len(self.mine):
            return x.narrow(dim, first, stop - first)
        return x.index_select(dim, torch.tensor(self.mine, device=x.device))

    def fill(self, part: Tensor, dim: int = 0) -> Tensor:
        """`part`, which has this rank's indices of `dim`, with zeros for the others."""
        whole = part.new_zeros([self.shape[0] if d == dim else n for d, n in enumerate(part.shape)])
        return whole.index_copy(dim, torch.tensor(self.mine, device=part.device), part)

    def filled(self) -> Tensor:
        return self.fill(self.local)


Rule = Callable[[str, Any, Any, Any], Any]


def use(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    tables = [one for one in (*args, *kwargs.values()) if isinstance(one, Rows)]
    for one in tables:
        one.uses.add("any")
    for rule in _rules(name):
        found = rule(name, func, args, kwargs)
        if found is not None:
            return found
    args, kwargs = tree_map(_filled, (args, kwargs))
    return func(*args, **kwargs)


def _rules(name: str) -> Sequence[Rule]:
    return ROWS.get(name, ()) if name not in PRODUCTS else (_row_product, *ROWS.get(name, ()))


def _filled(leaf: Any) -> Any:
    if isinstance(leaf, Rows):
        leaf.uses |= {"any", "own"}
    return leaf.filled() if isinstance(leaf, Standin) else leaf


def _getitem(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """One expert's row, or those of a list of experts."""
    table, index = args
    if not isinstance(table, Standin):
        return None
    if isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8) and index.dim() == 1:
        return _gathered(table, index) if isinstance(table, Rows) else None
    single = isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool
    if not single and (isinstance(index, bool) or not isinstance(index, int)):
        return None
    return _row(table, int(index))  # type: ignore[arg-type]


def _row(table: Rows | Nothing, number: int) -> Tensor:
    if not -table.shape[0] <= number < table.shape[0]:
        raise IndexError(f"index {number} is out of bounds for the {table.shape[0]} rows of {table!r}")
    number %= table.shape[0]
    if isinstance(table, Nothing):
        return Nothing.of(table.shape[1:], table, table.value)
    if number not in table.mine:
        return Nothing.of(table.shape[1:], table)
    table.uses.add("own")
    return table.local[table.mine.index(number)]


def _gathered(table: Rows, index: Tensor) -> Tensor:
    table.uses.add("own")
    place = torch.full((table.shape[0],), -1, dtype=torch.int64)
    place[torch.tensor(table.mine)] = torch.arange(len(table.mine))
    place = place.to(index.device)[index]
    found = table.local[place.clamp(min=0)]
    return found.masked_fill((place < 0).view(-1, *(1,) * (found.dim() - 1)), 0)


def _unbind(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(args[0], Rows) or dim % args[0].dim():
        return None
    return tuple(_row(args[0], number) for number in range(args[0].shape[0]))


def _cast(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """What goes element by element."""
    table, *rest = args
    if any(isinstance(one, Standin) for one in (*rest, *kwargs.values())):
        return None
    if isinstance(table, Rows):
        return table.like(func(table.local, *rest, **kwargs))
    made = func(torch.empty(0, dtype=table.dtype, device=table.device), *rest, **kwargs)
    return Nothing.of(table.shape, made, table.value)


def _moved(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Another order of dims, of which the experts' stays the first."""
    table, *rest = args
    if name == "__get__" and getattr(func, "__self__", None) not in TURNS:
        return None
    if isinstance(table, Nothing):
        return Nothing.of(func(torch.empty(table.shape, device="meta"), *rest, **kwargs).shape, table, table.value)
    strides = torch.empty_strided(table.shape, [10 ** (table.dim() - d) for d in range(table.dim())], device="meta")
    if func(strides, *rest, **kwargs).stride(0) != strides.stride(0):
        return None
    return table.like(func(table.local, *rest, **kwargs))


def _row_product(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """x @ 0, with a bias in `linear`."""
    told = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    x, weight, bias = told.get("input"), told.get("weight", told.get("other", told.get("mat2"))), told.get("bias")
    if not isinstance(weight, Nothing) or not isinstance(x, Tensor) or isinstance(x, Standin) or weight.dim() != 2:
        return None
    size = weight.shape[0] if name == "linear" else weight.shape[1]
    found = torch.full((*x.shape[:-1], size), weight.value, dtype=_product_dtype(x), device=x.device)
    return found if bias is None or isinstance(bias, Nothing) else found + bias


def _blank(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A product with a table of which nothing is here: only its shape is found."""
    tables = [one for one in args if isinstance(one, Nothing)]
    if kwargs or not tables or not all(isinstance(one, (Tensor, str)) for one in args):
        return None
    like = next((one for one in args if isinstance(one, Tensor) and not isinstance(one, Standin)), tables[0])
    shape = func(*(torch.empty(one.shape, device="meta") if isinstance(one, Tensor) else one for one in args)).shape
    return torch.full(shape, tables[0].value, dtype=_product_dtype(like), device=like.device)


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _all_rows(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A batch of products, one for each expert."""
    if kwargs or len(args) != 2:
        return None
    left, right = args
    table = left if isinstance(left, Rows) else right
    other = right if table is left else left
    if not isinstance(table, Rows) or isinstance(other, Standin) or table.dim() != 3:
        return None
    if other.dim() > 3 or (other.dim() < 3 and table is left):
        return None
    table.uses.add("own")
    if other.dim() == 3 and other.shape[0] != 1:
        other = table.take(other)
    return table.fill(func(table.local, other) if table is left else func(other, table.local))


def _added(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """`baddbmm(bias, x, table)`."""
    bias, left, table = args if len(args) == 3 else (None,) * 3
    if kwargs or not isinstance(table, Rows) or not isinstance(left, Tensor) or isinstance(left, Standin):
        return None
    table.uses.add("own")
    if isinstance(bias, Rows):
        bias.uses.add("own")
        return table.fill(func(bias.local, table.take(left), table.local))
    return None


def _einsum(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Along the letter of the experts, the other operands are cut as the table is."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return None
    before, after = equation.replace(" ", "").split("->")
    terms = before.split(",")
    tables = [(term, one) for term, one in zip(terms, operands, strict=True) if isinstance(one, Rows)]
    letters = {term[0] for term, _ in tables}
    if len(letters) != 1 or any(isinstance(one, Nothing) for one in operands):
        return None
    (letter,), table = letters, tables[0][1]
    cut = []
    for term, one in zip(terms, operands, strict=True):
        if isinstance(one, Rows):
            one.uses.add("own")
            cut.append(one.local)
        else:
            cut.append(table.take(one, term.index(letter)) if letter in term else one)
    found = func(equation, *cut)
    return table.fill(found, after.index(letter)) if letter in after else found


def _grouped(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of `x` in the order of their experts, up to `offs[e]` those of expert `e`: this rank's are a slice."""
    told = {**dict(zip(("input", "weight", "offs"), args, strict=False)), **kwargs}
    offs: Any = told.get("offs")
    x: Any = told.get("input", told.get("mat_a"))
    table = told.get("weight", told.get("mat_b"))
    if not isinstance(table, Standin) or isinstance(x, Standin) or offs is None or told.get("bias") is not None:
        return None
    if isinstance(table, Nothing):
        return x.new_full((x.shape[0], table.shape[2]), table.value)
    assert isinstance(table, Rows)
    ends = [0, *offs.tolist()]
    pieces: list[Tensor] = []
    at = done = 0
    for first, stop in spans(tuple(int(e in table.mine) for e in range(table.shape[0])), 1):
        weight = table.local.narrow(0, at, stop - first)
        at += stop - first
        if ends[stop] > ends[first]:
            table.uses.add("own")
            part = func(x[ends[first] : ends[stop]], weight, offs=offs[first:stop] - ends[first])
            pieces += [part.new_zeros(ends[first] - done, part.shape[1]), part]
            done = ends[stop]
    last = pieces[-1] if pieces else x
    return torch.cat([*pieces, last.new_zeros(x.shape[0] - done, table.shape[2])])


ROWS: dict[str, tuple[Rule, ...]] = {
    "__getitem__": (_getitem,),
    "unbind": (_unbind,),
    **dict.fromkeys(CASTS, (_cast,)),
    **dict.fromkeys(("transpose", "swapaxes", "permute", "t", "__get__"), (_moved,)),
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), (_all_rows, _blank)),
    "baddbmm": (_added,),
    "einsum": (_einsum, _blank),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), (_grouped,)),
}
