"""The picture in docs/comm.md of which mode keeps up with which link: it is drawn from the model that `auto` uses.

`python -m tests.pure.plan.test_mode_picture` draws it anew.
"""

from __future__ import annotations

from pathlib import Path

from shardwise.observe.svg import Series, line_plot
from shardwise.plan.auto_sync import Measured, choose, rates_of
from shardwise.spec.sync import Sync

PICTURE = Path(__file__).parents[3] / "docs" / "pictures" / "comm-modes.svg"
EXACT = Sync()
ALLOW = ("compressed", "local")
SHOWN = {  # by position among all that `auto` considers
    0: "all_reduce",
    1: "compressed, int8",
    2: "local, every 2 steps, 8 bits",
    5: "local, every 4 steps, 2 bits, 2 fragments",
    6: "local, every 4 steps, 2 bits, 4 fragments",
}
DECADES = [0.5 + 0.05 * i for i in range(81)]  # of Mbit/s


def measured(mbit: float) -> Measured:
    """A step of 25 ms between two ranks, a million parameters, 0.2 ms a message."""
    bandwidth = mbit * 1e6 / 8
    return Measured(0.025, 0.025 + 4e6 / bandwidth, 2e-4, bandwidth, 1_000_000, 2, True)


def picture() -> str:
    lines: dict[int, list[tuple[float, float]]] = {number: [] for number in SHOWN}
    for decade in DECADES:
        rates = list(rates_of(measured(10**decade), ALLOW, EXACT).values())
        for number, points in lines.items():
            points.append((decade, rates[number]))
    series = [
        Series(name=SHOWN[number], points=tuple(points), colour=colour)
        for colour, (number, points) in enumerate(lines.items())
    ]
    title = "rate with the mode / rate without synchronisation"
    return line_plot(title, series, x_label="log10 of the link in Mbit/s (1: 10, 2: 100, 3: 1000)", zero=True)


def test_the_picture_is_what_the_model_says() -> None:
    assert PICTURE.read_text() == picture()


def test_the_modes_shown_are_those_that_are_named() -> None:
    syncs = list(rates_of(measured(100), ALLOW, EXACT))
    found = [(s.word, s.every, s.bits, s.fragments if s.method == "streaming" else 1) for s in syncs]
    assert [found[number] for number in SHOWN] == [
        ("all_reduce", 0, 32, 1),
        ("compressed", 0, 32, 1),
        ("local", 2, 8, 1),
        ("local", 4, 2, 2),
        ("local", 4, 2, 4),
    ]


def test_the_slower_the_link_the_further_down_the_list() -> None:
    order = list(rates_of(measured(100), ALLOW, EXACT))
    places = [order.index(choose(measured(10**decade), ALLOW, EXACT).sync) for decade in reversed(DECADES)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, len(order) - 1)


if __name__ == "__main__":
    PICTURE.write_text(picture())
