"""A calibration drawn as text: every pair and every size is in it, wide clusters as one character a pair."""

from __future__ import annotations

from shardwise.observe.matrix import SHADES, WIDEST, collectives_table, matrices
from shardwise.spec.cluster import Calibration, Link, Pair


def measured(ranks: int, **collectives: tuple[tuple[int, float], ...]) -> Calibration:
    """The link from a to b has a latency of a us and a bandwidth of 2^b MiB/s."""
    pairs = tuple(
        Pair(source=a, target=b, link=Link(latency_s=(a + 1) * 1e-6, bandwidth=2.0**b * 2**20, measured=True))
        for a in range(ranks)
        for b in range(ranks)
        if a != b
    )
    return Calibration(backend="shm", ranks=ranks, pairs=pairs, collectives=collectives)


def test_a_row_for_each_sender_and_a_column_for_each_receiver() -> None:
    latency, bandwidth = matrices(measured(3))
    assert latency.head == bandwidth.head == ("", "to 0", "to 1", "to 2")
    assert [row[1:] for row in latency.rows] == [("-", "1 us", "1 us"), ("2 us", "-", "2 us"), ("3 us", "3 us", "-")]
    assert bandwidth.rows[0] == ("rank 0", "-", "2.0 MiB/s", "4.0 MiB/s")


def test_a_wide_cluster_is_one_character_a_pair_dark_is_more() -> None:
    ranks = WIDEST + 2
    latency, bandwidth = matrices(measured(ranks))
    assert "'.' is 1 us, '@' is 10 us" in latency.title
    cells = [row[1] for row in bandwidth.rows]
    assert all(len(cell) == ranks for cell in cells)
    assert all(cells[rank][rank] == SHADES[0] for rank in range(ranks)), "nobody sends to itself"
    assert cells[0][-1] == "@"
    assert cells[-1][0] == "."
    order = [SHADES.index(cell) for cell in cells[0][1:]]
    assert order == sorted(order)


def test_links_that_are_all_alike_and_none_at_all_can_be_drawn() -> None:
    alike = Calibration(
        backend="gloo",
        ranks=10,
        pairs=tuple(
            Pair(source=a, target=9, link=Link(latency_s=1e-3, bandwidth=1e9, measured=True)) for a in range(9)
        ),
    )
    assert matrices(alike)[0].rows[0] == ("rank 0", " " * 9 + ".")
    assert "nothing was measured" in matrices(Calibration(backend="gloo", ranks=10))[0].title


def test_collectives_by_size_with_gaps_and_the_barrier_without_one() -> None:
    table = collectives_table(
        measured(2, all_reduce=((1024, 1e-5), (2048, 2e-5)), all_gather=((1024, 1e-3),), barrier=((0, 5e-6),))
    )
    assert table.head == ("", "1.0 KiB", "2.0 KiB")
    assert table.rows == (("all_reduce", "10 us", "20 us"), ("all_gather", "1.0 ms", "-"), ("barrier", "5 us", ""))
