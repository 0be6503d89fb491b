"""The layout against numpy: every plan of up to 8 ranks holds every element as often as its axes say, and no other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.checkpoint.relayout import moves
from shardwise.errors import SpecError
from shardwise.spec.layout import (
    Box,
    boxes,
    covers,
    holds,
    intersect,
    local_offsets,
    local_shape,
    parameter,
    whole,
    written_by,
)
from shardwise.spec.plan import Plan, Split, Stage

EVERY = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["a fifth", "all"])
BLOCKS = tuple(f"blocks.{i}" for i in range(4))
PARAMETERS: dict[str, tuple[int, ...]] = {
    "embed.weight": (11, 6),
    "free.weight": (3, 2),
    **{
        f"{block}.{name}": shape
        for block in BLOCKS
        for name, shape in {
            "attn.qkv.weight": (22, 6),
            "attn.qkv.bias": (22,),
            "attn.out.weight": (6, 10),
            "attn.out.bias": (6,),
            "up.weight": (7, 6),
            "up.bias": (7,),
            "down.weight": (6, 7, 2),
            "norm.weight": (6,),
            "empty": (0, 3),
        }.items()
    },
}
BUFFERS = {"blocks.1.norm.count": (), "blocks.2.norm.mean": (6,)}
TENSORS = {
    **{f"model/{name}": shape for name, shape in PARAMETERS.items()},
    **{f"buffer/{name}": shape for name, shape in BUFFERS.items()},
    **{f"optimizer/{name}/exp_avg": shape for name, shape in PARAMETERS.items()},
    **{f"optimizer/{name}/step": () for name in PARAMETERS},
}
SOME = [name for name in TENSORS if "blocks" not in name or "blocks.2" in name]
CUT = ("qkv", "out.weight", "up", "down", "embed")


def uneven(units: int, ranks: int) -> tuple[int, ...]:
    """Units over ranks, the last ranks one more: unlike `torch.chunk`, where the first ranks have more."""
    return tuple(reversed([units // ranks + (i < units % ranks) for i in range(ranks)]))


def make_plan(data: int, shard: int, tensor: int, pipeline: int, zero: int = 3, virtual: int = 1) -> Plan:
    num_stages = pipeline * virtual
    ends = [round(i * len(BLOCKS) / num_stages) for i in range(num_stages + 1)]
    stages = tuple(
        Stage(first=a, last=b - 1, holds=("embed",) if i in (0, num_stages - 1) else ())
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    )
    fused = uneven(5, tensor) + uneven(3, tensor) + uneven(3, tensor)
    return Plan(
        data=data,
        shard=shard,
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        zero=zero,
        blocks=BLOCKS,
        stages=stages if num_stages > 1 else (),
        schedule="zbv" if virtual == 2 else "1f1b",
        splits={
            "embed": Split(how="vocabulary"),
            "*.attn.qkv": Split(how="column", parts=fused),
            "*.attn.out": Split(how="row", parts=uneven(5, tensor)),
            "*.up": Split(how="column"),
            "*.down.weight": Split(how="row"),
            "*.norm": Split(how="whole"),
        },
    )


@cache
def all_plans() -> tuple[Plan, ...]:
    """Every mesh of at most 8 ranks, with what the shard axis shards and two stages a rank varied."""
    sizes = [s for s in itertools.product(range(1, 9), repeat=4) if s[0] * s[1] * s[2] * s[3] <= 8]
    plans = [make_plan(*s) for s in sizes]
    plans += [make_plan(*s, zero=1) for s in sizes if s[1] > 1]
    plans += [make_plan(*s, virtual=2) for s in sizes if s[3] == 2]
    return tuple(plans)


def replicas(name: str, plan: Plan) -> int:
    """How many ranks should hold each element, said without the code under test."""
    cut = plan.tensor > 1 and TENSORS[name] and any(word in name for word in CUT)
    sharded = TENSORS[name] and (name.startswith("optimizer/") or (name.startswith("model/") and plan.zero == 3))
    count = plan.data * (1 if sharded else plan.shard) * (1 if cut else plan.tensor)
    if "embed" in name:
        return count * (1 if plan.schedule == "zbv" else min(2, plan.pipeline))  # a V ends on the rank it began on
    return count * (plan.pipeline if "free" in name else 1)


def local_index(held: tuple[Box, ...], dims: int) -> tuple[np.ndarray, ...]:
    """The index that picks a rank's local tensor out of the global one."""
    spans = [dict.fromkeys((b.offset[d], b.shape[d]) for b in held) for d in range(dims)]
    return np.ix_(*[np.concatenate([np.arange(o, o + s) for o, s in side]) for side in spans])


@EVERY
def test_every_plan_holds_every_element_once_in_each_replica(every: int) -> None:
    assert len(all_plans()) > 100
    for plan in all_plans()[::every]:
        for name, shape in TENSORS.items():
            count = np.zeros(shape, dtype=int)
            for rank in range(plan.ranks):
                for box in boxes(name, shape, plan, rank):
                    count[box.slices] += 1
            assert (count == replicas(name, plan)).all(), (name, str(plan))


@EVERY
def test_every_element_is_written_once_by_a_rank_that_holds_it(every: int) -> None:
    for plan in all_plans()[::every]:
        written = {name: np.zeros(TENSORS[name], dtype=int) for name in SOME}
        for rank in range(plan.ranks):
            held = {name: (TENSORS[name], 4) for name in SOME if holds(name, plan, rank)}
            for name, box in written_by(held, plan, rank):
                written[name][box.slices] += 1
                assert any(intersect(box, own) == box for own in boxes(name, TENSORS[name], plan, rank))
        assert all((count == 1).all() for count in written.values()), str(plan)


def sources(name: str) -> set[tuple[Box, ...]]:
    """Every way in which a tensor can be spread over files."""
    return {
        tuple(dict.fromkeys(b for rank in range(plan.ranks) for b in boxes(name, TENSORS[name], plan, rank)))
        for plan in all_plans()
    }


def targets(name: str) -> Iterator[tuple[tuple[Box, ...], tuple[int, ...]]]:
    """Every set of boxes that a rank of some plan wants, with the shape of its local tensor."""
    seen = set()
    for plan in all_plans():
        for rank in range(plan.ranks):
            held = boxes(name, TENSORS[name], plan, rank)
            if held not in seen:
                seen.add(held)
                yield held, local_shape(name, TENSORS[name], plan, rank)


@pytest.mark.parametrize("name", SOME)
def test_any_plan_can_be_laid_out_again_as_any_other(name: str) -> None:
    shape = TENSORS[name]
    tensor = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    wanted = list(targets(name))
    for have in sources(name):
        stored = [tensor[box.slices] for box in have]
        for held, shape_here in wanted:
            local = np.full(shape_here, -1)
            filled = 0
            for move in moves(have, held):
                local[move.put.slices] = stored[move.source][move.take.slices]
                filled += move.take.size
            expected = tensor[local_index(held, len(shape))] if held and shape else tensor
            if held:
                assert filled == local.size
                np.testing.assert_array_equal(local, expected)


@pytest.mark.parametrize(
    ("parts", "tensor", "rows"),
    [
        ((), 2, [range(0, 6), range(6, 12)]),
        ((), 5, [range(0, 3), range(3, 6), range(6, 9), range(9, 12), range(0)]),
        ((2, 1), 2, [range(0, 8), range(8, 12)]),
        ((2, 2, 1, 1), 2, [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10, 11]]),
        ((0, 2, 1, 0), 2, [[8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_a_column_split_gives_these_rows(parts: tuple[int, ...], tensor: int, rows: list[list[int]]) -> None:
    plan = Plan(tensor=tensor, splits={"fc": Split(how="column", parts=parts)})
    for name, shape in (("model/fc.weight", (12, 3)), ("model/fc.bias", (12,)), ("optimizer/fc.weight/m", (12, 3))):
        held = [boxes(name, shape, plan, rank) for rank in range(tensor)]
        assert [[i for b in own for i in range(b.offset[0], b.offset[0] + b.shape[0])] for own in held] == [
            list(r) for r in rows
        ]
        assert [local_shape(name, shape, plan, rank)[0] for rank in range(tensor)] == [len(r) for r in rows]


def test_a_fused_column_split_is_sharded_along_its_local_rows() -> None:
    plan = Plan(tensor=2, shard=2, splits={"fc": Split(how="column", parts=(2, 2, 1, 1))})
    rows = [
        [i for b in boxes("model/fc.weight", (12, 3), plan, rank) for i in range(b.offset[0], b.offset[0] + b.shape[0])]
        for rank in range(4)
    ]
    assert rows == [[0, 1, 2], [4, 5, 6], [3, 8, 9], [7, 10, 11]]  # shard is the outer axis


def test_the_first_pattern_that_matches_decides() -> None:
    splits = {"a.fc.weight": Split(how="row"), "*": Split(how="column")}
    plan = Plan(tensor=2, splits=splits)
    assert boxes("model/a.fc.weight", (4, 4), plan, 1) == (Box((0, 2), (4, 2)),)
    assert boxes("model/b.fc.weight", (4, 4), plan, 1) == (Box((2, 0), (2, 4)),)


def test_parts_that_do_not_fit_are_refused_by_name() -> None:
    plan = Plan(tensor=2, splits={"fc": Split(how="column", parts=(3, 2))})
    with pytest.raises(SpecError, match=r"parts=\(3, 2\) of 'model/fc.weight'.*12 elements"):
        boxes("model/fc.weight", (12, 3), plan, 0)
    plan = Plan(tensor=2, splits={"fc": Split(how="column", parts=(3, 2, 1))})
    with pytest.raises(SpecError, match="one part for each"):
        boxes("model/fc.weight", (12, 3), plan, 0)


def test_a_block_in_no_stage_is_refused() -> None:
    plan = Plan(pipeline=2, blocks=("a", "b", "c"), stages=(Stage(first=0, last=0), Stage(first=2, last=2)))
    assert holds("model/a.weight", plan, 0)
    assert not holds("model/a.weight", plan, 1)
    with pytest.raises(SpecError, match=r"block 1 \(b\) is in no stage"):
        holds("model/b.weight", plan, 0)


def test_a_block_prefix_is_not_a_prefix_of_letters() -> None:
    blocks = tuple(f"blocks.{i}" for i in range(11))
    plan = Plan(pipeline=2, blocks=blocks, stages=(Stage(first=0, last=9), Stage(first=10, last=10)))
    assert [holds("model/blocks.1.weight", plan, rank) for rank in (0, 1)] == [True, False]
    assert [holds("model/blocks.10.weight", plan, rank) for rank in (0, 1)] == [False, True]


def test_names_that_a_checkpoint_quotes_are_the_modules_own() -> None:
    stages = (Stage(first=0, last=0), Stage(first=1, last=1))
    plan = Plan(pipeline=2, blocks=("parts.a/b", "parts.50% x"), stages=stages)
    for name in ("model/parts.a%2Fb.weight", "buffer/parts.a%2Fb.mean", "optimizer/parts.a%2Fb.weight/exp_avg"):
        assert [holds(name, plan, rank) for rank in (0, 1)] == [True, False]
    assert [holds("model/parts.50%25 x.weight", plan, rank) for rank in (0, 1)] == [False, True]


def test_interleaved_stages_go_round_and_v_schedules_go_back() -> None:
    stages = tuple(Stage(first=i, last=i) for i in range(4))
    round_robin = Plan(pipeline=2, virtual=2, blocks=BLOCKS, stages=stages, schedule="interleaved1f1b")
    back = Plan(pipeline=2, virtual=2, blocks=BLOCKS, stages=stages, schedule="zbv")
    names = [f"model/{block}.up.weight" for block in BLOCKS]
    assert [[holds(n, round_robin, r) for n in names] for r in (0, 1)] == [[True, False] * 2, [False, True] * 2]
    assert [[holds(n, back, r) for n in names] for r in (0, 1)] == [
        [True, False, False, True],
        [False, True, True, False],
    ]


def test_writing_is_shared_evenly_by_bytes() -> None:
    tensors = {f"model/{i}": ((64, 1 + i), 4) for i in range(200)}
    total = sum(rows * columns * size for ((rows, columns), size) in tensors.values())
    for ranks in (2, 3, 4, 8):
        plan = Plan(data=ranks)
        loads = [
            sum(box.size * tensors[name][1] for name, box in written_by(tensors, plan, r)) for r in range(plan.ranks)
        ]
        assert sum(loads) == total
        assert max(loads) < 1.01 * total / ranks


def test_one_large_tensor_is_cut_so_that_all_write() -> None:
    tensors = {"model/embed": ((50_000, 64), 4), "model/norm": ((64,), 4)}
    loads = [sum(box.size for _, box in written_by(tensors, Plan(data=4), rank)) for rank in range(4)]
    assert max(loads) < 1.1 * sum(loads) / 4


def test_the_parameter_of_a_tensor() -> None:
    assert parameter("model/a.b.weight") == "a.b.weight"
    assert parameter("buffer/a.mean") == "a.mean"
    assert parameter("optimizer/a.b.weight/exp_avg/3") == "a.b.weight"
    assert parameter("a.b.weight") == "a.b.weight"


@st.composite
def box_lists(draw: st.DrawFn) -> tuple[list[Box], tuple[int, ...]]:
    shape = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    sides = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    one = st.tuples(*sides).map(lambda side: Box(tuple(a for a, _ in side), tuple(b - a for a, b in side)))
    return draw(st.lists(one, max_size=5)), shape


@given(box_lists())
def test_covers_and_intersect_agree_with_counting(drawn: tuple[list[Box], tuple[int, ...]]) -> None:
    held, shape = drawn
    count = np.zeros(shape, dtype=int)
    for box in held:
        count[box.slices] += 1
    assert covers(held, shape) == bool((count == 1).all())
    for a, b in itertools.combinations(held, 2):
        mask_a, mask_b = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        mask_a[a.slices], mask_b[b.slices] = True, True
        both = np.zeros(shape, dtype=bool)
        common = intersect(a, b)
        if common is not None:
            both[common.slices] = True
        np.testing.assert_array_equal(both, mask_a & mask_b)


@given(st.integers(0, 3), st.integers(0, 3))
def test_a_box_outside_the_tensor_does_not_cover_it(offset: int, extent: int) -> None:
    box = Box((offset,), (extent,))
    assert covers([box], (2,)) == (offset == 0 and extent == 2)
    assert not covers([Box((-1,), (2,))], (2,))
    assert not covers([Box((0, 0), (2, 1))], (2,))


def test_partition_by_hypercubes_is_a_cover() -> None:
    corners = list(itertools.product((0, 2), (0, 3), (0, 1)))
    held = [Box(c, (2, 3, 1)) for c in corners]
    assert covers(held, (4, 6, 2))
    assert not covers([*held[1:], held[1]], (4, 6, 2))
    assert local_offsets([whole(())]) == [()]
