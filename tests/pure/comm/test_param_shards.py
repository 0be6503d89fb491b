"""Where the elements of tensors lie: every element has one server, pieces are even, tables are cut by rows."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm.param_shards import Fact, Shards, place

SHAPES = st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple), min_size=1, max_size=12)


def facts(shapes: list[tuple[int, ...]], kinds: list[int], tables: list[bool]) -> list[Fact]:
    return [
        Fact(f"t{i}", shape, 4, kinds[i % len(kinds)], table=tables[i % len(tables)] and len(shape) == 2)
        for i, shape in enumerate(shapes)
    ]


def owners(shards: Shards, fact: Fact) -> list[int]:
    """The server of every element (of every row, of a table)."""
    found: list[int | None] = [None] * (fact.shape[0] if fact.table else fact.numel)
    for server in range(shards.servers):
        for box in shards.boxes(fact.name, server):
            for at in range(box.offset[0], box.offset[0] + box.shape[0]):
                assert found[at] is None, f"{fact.name}[{at}] is on two servers"
                found[at] = server
    assert None not in found, f"{fact.name} has elements on no server"
    return [owner for owner in found if owner is not None]


@given(
    SHAPES,
    st.lists(st.integers(0, 1), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 4000),
    st.booleans(),
)
def test_every_element_has_exactly_one_server(
    shapes: list[tuple[int, ...]], kinds: list[int], tables: list[bool], servers: int, limit: int, cut: bool
) -> None:
    given = facts(shapes, kinds, tables)
    shards = place(given, servers, limit, cut=cut)
    assert shards == place(given, servers, limit, cut=cut)
    for fact in given:
        found = owners(shards, fact)
        assert found == sorted(found), "a server has one run of a tensor, in the order of the servers"
        if not cut and not fact.table:
            assert len(set(found)) <= 1, "a tensor was cut"
        if fact.table and found:
            counts = [found.count(s) for s in range(servers)]
            assert max(counts) - min(counts) <= 1
    for flat in shards.flats:
        ends = 0
        for placed in sorted(flat.placed, key=lambda p: p.offset):
            assert placed.offset >= ends or placed.numel == 0, "two tensors lie on each other"
            ends = placed.offset + placed.numel
        assert ends <= flat.piece * servers
        kind = {fact.kind for fact in given for placed in flat.placed if placed.name == fact.name}
        assert kind <= {flat.kind}
        if len(flat.placed) > 1:
            assert sum(placed.numel for placed in flat.placed) * 4 <= limit


def test_a_large_tensor_is_cut_evenly() -> None:
    shards = place([Fact("big", (1000, 64), 4, "f"), Fact("small", (64,), 4, "f")], 4, 1 << 20)
    sizes = [sum(box.shape[0] for box in shards.boxes("big", server)) for server in range(4)]
    assert sum(sizes) == 64000
    assert max(sizes) - min(sizes) <= 64 + 16 * 4


def test_flats_come_in_the_order_in_which_they_are_complete() -> None:
    given = [Fact("a", (8,), 4, "x"), Fact("b", (8,), 4, "y"), Fact("c", (8,), 4, "x")]
    shards = place(given, 2, 32)
    assert [[p.name for p in flat.placed] for flat in shards.flats] == [["a"], ["b"], ["c"]]
    assert [[p.name for p in flat.placed] for flat in place(given, 2, 64).flats] == [["b"], ["a", "c"]]


def test_whole_tensors_are_spread_by_size() -> None:
    given = [Fact(f"t{i}", (size,), 4, "f") for i, size in enumerate([16, 16, 16, 48])]
    (flat,) = place(given, 2, 1 << 20, cut=False).flats
    assert flat.piece == 48
    assert math.fsum(p.numel for p in flat.placed) == 96
