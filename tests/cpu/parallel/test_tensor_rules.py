"""The arithmetic of cut values, against real tensors: whatever a rule says is cut is what ranks compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.parallel.tensor.atoms import Atoms, Conflict, deal, parts_of, spans
from shardwise.parallel.tensor.capture import capture
from shardwise.parallel.tensor.layouts import factors
from shardwise.parallel.tensor.propose import owned_under, propose
from shardwise.parallel.tensor.prove import difference, joined, part
from shardwise.spec.plan import Plan, Split

RANKS = st.integers(2, 4)


@given(RANKS, st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_parts_of_any_owners_lead_back_to_them(ranks: int, owners: list[int]) -> None:
    ids = tuple(owner % ranks for owner in owners)
    plan = Plan(tensor=ranks, splits={"w": Split(how="column", parts=parts_of(ids, ranks))})
    assert owned_under({"w": (len(ids),)}, plan)["w"].ids == ids


@given(RANKS, st.lists(st.integers(0, 3), min_size=1, max_size=24), st.integers(0, 1))
def test_parts_of_a_tensor_joined_are_the_tensor(ranks: int, owners: list[int], dim: int) -> None:
    ids = tuple(owner % ranks for owner in owners)
    x = torch.randn((len(ids), 3) if dim == 0 else (3, len(ids)))
    assert torch.equal(joined([part(x, dim, ids, rank) for rank in range(ranks)], dim, ids), x)


@given(st.integers(1, 30), RANKS)
def test_atoms_are_dealt_evenly_and_in_order(count: int, ranks: int) -> None:
    dealt = list(deal(range(count), ranks).values())
    assert dealt == sorted(dealt)
    sizes = [dealt.count(rank) for rank in range(ranks)]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12))
def test_atoms_that_were_joined_stay_together(pairs: list[tuple[int, int]]) -> None:
    atoms = Atoms()
    ids = atoms.fresh(8)
    for one, other in pairs:
        atoms.same((ids[one],), (ids[other],))
    assert all(atoms.find(ids[one]) == atoms.find(ids[other]) for one, other in pairs)


@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5), st.data())
def test_factors_multiply_to_both_shapes(sizes: list[int], data: Any) -> None:
    def grouped() -> tuple[int, ...]:
        found, rest = [], list(sizes)
        while rest:
            count = data.draw(st.integers(1, len(rest)))
            found.append(int(torch.tensor(rest[:count]).prod()))
            rest = rest[count:]
        return tuple(found)

    before, after = grouped(), grouped()
    try:
        inner, outer = factors(before, after)
    except Conflict:
        assume(False)
    for shape, groups in ((before, inner), (after, outer)):
        assert [int(torch.tensor([n for n, _ in group] or [1]).prod()) for group in groups] == list(shape)
    assert sorted(one for group in inner for one in group) == sorted(one for group in outer for one in group)


@given(RANKS, st.lists(st.integers(0, 3), max_size=24))
def test_spans_are_the_indices_of_a_rank(ranks: int, owners: list[int]) -> None:
    ids = tuple(owner % ranks for owner in owners)
    for rank in range(ranks):
        held = [index for first, stop in spans(ids, rank) for index in range(first, stop)]
        assert held == [index for index, owner in enumerate(ids) if owner == rank]


class Between(nn.Module):
    """A linear layer, something, and a linear layer that sums over what came out."""

    def __init__(self, width: int, what: Any, out: int | None = None) -> None:
        super().__init__()
        self.first, self.what = nn.Linear(6, width), what
        self.last = nn.Linear(out or width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.what(self.first(x)))


def heads(order: str, count: int) -> Any:
    """Attention of a fused query, key and value, the heads and the three in some order."""

    def attend(x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if order == "three first":
            q, k, v = x.view(b, t, 3, count, -1).permute(2, 0, 3, 1, 4).unbind(0)
        elif order == "heads first":
            q, k, v = x.view(b, t, count, -1).transpose(1, 2).chunk(3, -1)
        elif order == "innermost":
            q, k, v = x.view(b, t, count, 3, -1).unbind(3)
            q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        else:
            q, k, v = (one.view(b, t, count, -1).transpose(1, 2) for one in x.split(x.shape[-1] // 3, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return attend


THROUGH: dict[str, tuple[int, Any, int | None]] = {
    "pieces": (24, heads("pieces", 4), 8),
    "three first": (24, heads("three first", 4), 8),
    "heads first": (24, heads("heads first", 4), 8),
    "innermost": (24, heads("innermost", 4), 8),
    "uneven heads": (60, heads("pieces", 5), 20),
    "gate": (16, lambda x: F.silu(x[..., :8]) * x[..., 8:], 8),
    "gate in turns": (16, lambda x: F.glu(x.view(*x.shape[:-1], 8, 2).transpose(-1, -2).flatten(-2)), 8),
    "dropout": (8, lambda x: F.dropout(x.relu(), 0.5), None),
    "attention dropout": (
        24,
        lambda x: (
            F.scaled_dot_product_attention(
                *(one.unflatten(-1, (4, 2)).transpose(1, 2) for one in x.chunk(3, -1)), dropout_p=0.3
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        8,
    ),
    "rolled heads": (8, lambda x: x.view(*x.shape[:-1], 4, 2).roll(1, -1).flatten(-2), None),
    "repeated": (8, lambda x: x.view(*x.shape[:-1], 4, 2).repeat_interleave(3, -2).flatten(-2), 24),
    "expanded": (8, lambda x: x.view(*x.shape[:-1], 4, 1, 2).expand(-1, -1, 4, 3, 2).flatten(-3), 24),
    "joined": (8, lambda x: torch.cat([x.relu(), -x], -1), 16),
    "einsum": (8, lambda x: torch.einsum("bth,h->bth", x, torch.arange(8, dtype=x.dtype)), None),
    "in place": (8, lambda x: x.add_(1).relu_(), None),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", THROUGH)
def test_a_split_through_any_operation_is_proven(name: str, ranks: int) -> None:
    width, what, out = THROUGH[name]
    torch.manual_seed(0)
    module = Between(width, what, out).double()
    given_ = (torch.randn(2, 5, 6, dtype=torch.float64),)
    captured = capture(module, given_, {})
    assert captured is not None
    proposal = propose(captured, ranks, candidates=captured.names)
    if name != "gate in turns":
        assert {"first.weight", "first.bias", "last.weight"} <= proposal.owned.keys(), proposal.whole
    assert difference(module, given_, {}, captured, proposal.owned, ranks)[0] < 1e-12


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x.softmax(-1),
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: x.flip(-1).cumsum(-1),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x[..., ::2].repeat(1, 1, 2),
        lambda x: x.sort(-1).values,
    ],
)
def test_what_needs_the_whole_dim_keeps_the_layer_whole(what: Any) -> None:
    module = Between(8, what).double()
    given_ = (torch.randn(2, 5, 6, dtype=torch.float64),)
    captured = capture(module, given_, {})
    assert captured is not None
    proposal = propose(captured, 2, candidates=captured.names)
    assert "first.weight" not in proposal.owned
    assert difference(module, given_, {}, captured, proposal.owned, 2)[0] < 1e-12


def test_code_that_looks_at_numbers_is_not_captured() -> None:
    module = Between(8, lambda x: x if x.sum() > 0 else -x).double()
    assert capture(module, (torch.randn(2, 5, 6, dtype=torch.float64),), {}) is None


def test_a_gradient_of_ones_own_is_noticed() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    module = Between(8, Straight.apply).double()
    given_ = (torch.randn(2, 5, 6, dtype=torch.float64),)
    captured = capture(module, given_, {})
    assert captured is not None
    owned = propose(captured, 2, candidates=captured.names).owned
    assert difference(module, given_, {}, captured, owned, 2)[0] > 1e-3
