"""What ranks sent each other, remembered while it ran, and drawn: who, to whom, which piece, after what.

A tape keeps no times: a message's round is one more than that of the last message that its sender had waited for. So
the same run gives the same picture on any machine.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import torch

from shardwise.comm.mesh import connect
from shardwise.comm.store import listen, open_store
from shardwise.observe.svg import COLOURS
from shardwise.spec.plan import Plan

LIMIT_S = 60.0


class Event(NamedTuple):
    """A message was sent to `peer` (elements `first` to `last` of the rank's tensor), or one of its was waited for.

    `state` is what the tensor held at that moment, without what the message brought.
    """

    kind: str
    peer: int
    tag: int
    first: int
    last: int
    state: tuple[float, ...]


class Hop(NamedTuple):
    """A message as seen from above. Rounds count from 1."""

    round: int
    source: int
    target: int
    first: int
    last: int


class Film(NamedTuple):
    """A whole run: its messages, and what each rank's tensor held after each round: `states[round][rank]`."""

    hops: tuple[Hop, ...]
    states: tuple[tuple[tuple[float, ...], ...], ...]


class Tape:
    """Stands between an algorithm and the group of its ranks: passes messages on, and notes them in `events`."""

    def __init__(self, group: Any, tensor: torch.Tensor) -> None:
        self.group = group
        self.tensor = tensor
        self.events: list[Event] = []

    def send(self, tensors: Sequence[torch.Tensor], to: int, tag: int = 0) -> Any:
        piece = tensors[0]
        at = (piece.data_ptr() - self.tensor.data_ptr()) // self.tensor.element_size()
        assert 0 <= at <= at + piece.numel() <= self.tensor.numel(), "what is sent must lie in the tape's tensor"
        self.note("send", to, tag, at, at + piece.numel())
        return self.group.send([piece.clone()], to, tag)

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> Coming:
        return Coming(self, tensors[0], source, tag)

    def note(self, kind: str, peer: int = -1, tag: int = 0, first: int = 0, last: int = 0) -> None:
        self.events.append(Event(kind, peer, tag, first, last, tuple(self.tensor.tolist())))


class Coming:
    """A message that is awaited. It lands when somebody waits for it, so that when it came makes no difference."""

    def __init__(self, tape: Tape, target: torch.Tensor, source: int, tag: int) -> None:
        self.tape = tape
        self.target = target
        self.about = (source, tag)
        self.landed = torch.empty_like(target)
        self.work = tape.group.recv([self.landed], source, tag)

    def wait(self) -> bool:
        self.work.wait()
        self.tape.note("arrived", *self.about)
        self.target.copy_(self.landed)
        return True


# Running.


def film(size: int, fill: Callable[[int], Sequence[float]], algorithm: Callable[[Tape, int, int], object]) -> Film:
    """Start `size` processes, let each call `algorithm(tape, rank, size)` on a tensor of `fill(rank)`, and look on."""
    return developed(on_ranks(size, lambda group: _taped(group, fill, algorithm)))


def _taped(group: Any, fill: Callable[[int], Sequence[float]], algorithm: Callable[..., object]) -> list[Event]:
    tape = Tape(group, torch.tensor(fill(group.rank()), dtype=torch.float64))
    algorithm(tape, group.rank(), group.size())
    tape.note("end")
    return tape.events


def on_ranks(size: int, function: Callable[[Any], Any]) -> list[Any]:
    """What `function(group)` returns on each of `size` processes that were forked from this one and connected."""
    forked = multiprocessing.get_context("fork")
    listener = listen()
    port = listener.getsockname()[1]
    done = forked.Event()

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        for other, (_, writer) in enumerate(pipes):
            if other != rank:
                writer.close()  # so that a rank that died is an end of file, and no hang
        store = open_store(listener.detach() if rank == 0 else None, port, rank, size, LIMIT_S)
        mesh = connect(Plan(data=size), rank=rank, world=size, store=store, timeout_s=LIMIT_S)
        pipes[rank][1].send(function(mesh.axis("data").group))
        done.wait(LIMIT_S)  # the others may still need this one
        mesh.close()

    pipes = [forked.Pipe(duplex=False) for _ in range(size)]
    ranks = [forked.Process(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    listener.close()
    for _, writer in pipes:
        writer.close()
    try:
        return [reader.recv() for reader, _ in pipes]
    finally:
        done.set()
        for rank in ranks:
            rank.join()


# Developing: from what each rank noted to what happened.


def developed(tapes: Sequence[Sequence[Event]]) -> Film:
    """Put the ranks' notes together."""
    size = len(tapes)
    at, known = [0] * size, [0] * size
    channels: dict[tuple[int, int, int], list[Hop]] = {}
    hops: list[Hop] = []
    seen: list[list[tuple[int, tuple[float, ...]]]] = [[] for _ in range(size)]
    while moved := [r for r in range(size) if at[r] < len(tapes[r]) and _possible(tapes[r][at[r]], r, channels)]:
        for rank in moved:
            event = tapes[rank][at[rank]]
            at[rank] += 1
            seen[rank].append((known[rank], event.state))
            if event.kind == "send":
                hop = Hop(known[rank] + 1, rank, event.peer, event.first, event.last)
                hops.append(hop)
                channels.setdefault((rank, event.peer, event.tag), []).append(hop)
            elif event.kind == "arrived":
                known[rank] = max(known[rank], channels[event.peer, rank, event.tag].pop(0).round)
    assert all(a == len(tape) for a, tape in zip(at, tapes, strict=True)), "a message was awaited that nobody sent"
    rounds = max((hop.round for hop in hops), default=0)
    states = tuple(tuple(_last(seen[r], round) for r in range(size)) for round in range(rounds + 1))
    return Film(tuple(sorted(hops)), states)


def _possible(event: Event, rank: int, channels: dict[tuple[int, int, int], list[Hop]]) -> bool:
    return event.kind != "arrived" or bool(channels.get((event.peer, rank, event.tag)))


def _last(seen: Sequence[tuple[int, tuple[float, ...]]], round: int) -> tuple[float, ...]:
    """What the tensor held when the rank had used all that came up to `round`."""
    return [state for known, state in seen if known <= round][-1]


# Drawing.

WIDTH, LEFT, TOP, CELL, GAP = 640, 64, 52, 22, 46
INKS = (*COLOURS[:4], "#8b5cf6", "#94a3b8", "#14b8a6", "#ec4899")


def picture(title: str, film: Film, *, hosts: Sequence[Sequence[int]] = ()) -> str:
    """A column for each rank, a row for each round; every cell is an element, with a stripe for each rank in it.

    The elements must be sums of 10 ** rank, whose digits tell the ranks. Arrows between `hosts` are thick.
    """
    size, pieces = len(film.states[0]), len(film.states[0][0])
    column = (WIDTH - LEFT) / size
    cell = min(40.0, (column - 12) / pieces)
    at = [LEFT + column * (r + 0.5) - cell * pieces / 2 for r in range(size)]
    home = {rank: number for number, host in enumerate(hosts) for rank in host}
    parts = [_text(at[r] + cell * pieces / 2, TOP - 14, f"rank {r}", INKS[r]) for r in range(size)]
    for round, states in enumerate(film.states):
        y = TOP + round * (CELL + GAP)
        parts.append(_text(LEFT - 14, y + 15, f"round {round}" if round else "before", "", anchor="end"))
        for r, state in enumerate(states):
            parts += [_cell(at[r] + cell * i, y, cell, value, size) for i, value in enumerate(state)]
    for hop in film.hops:
        y = TOP + (hop.round - 1) * (CELL + GAP) + CELL
        middle = cell * (hop.first + hop.last) / 2
        far = bool(home) and home[hop.source] != home[hop.target]
        if hop.last - hop.first > 1:
            spans = [(at[hop.source], y + 3), (at[hop.target], y + GAP - 3)]
            parts += [_line(x + cell * hop.first + 2, b, x + cell * hop.last - 2, b, far) for x, b in spans]
        parts.append(_arrow(at[hop.source] + middle, y + 4, at[hop.target] + middle, y + GAP - 4, far))
    height = TOP + len(film.states) * (CELL + GAP) - GAP + 14
    style = f'style="width:100%;max-width:{WIDTH}px;color:inherit;font:12px system-ui,sans-serif" fill="currentColor"'
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"'
    head = f'<text x="4" y="18" font-weight="600">{escape(title)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>{head}{"".join(parts)}</svg>'


def digits(value: float, size: int) -> list[int]:
    """How often each rank's 10 ** rank is in `value`."""
    return [int(value) // 10**r % 10 for r in range(size)]


def _cell(x: float, y: float, width: float, value: float, size: int) -> str:
    """A box with a stripe in the colour of each rank whose number is in the sum."""
    stripe = (width - 4) / size
    inside = "".join(
        f'<rect x="{x + 2 + stripe * r:.1f}" y="{y + 2}" width="{stripe:.1f}" height="{CELL - 4}" fill="{INKS[r]}"/>'
        for r, count in enumerate(digits(value, size))
        if count
    )
    frame = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{CELL}" fill="none" stroke="currentColor"'
    return f'{frame} opacity="0.45"><title>{int(value):0{size}d}</title></rect>{inside}'


def _arrow(x1: float, y1: float, x2: float, y2: float, far: bool) -> str:
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    u, v = (x2 - x1) / length, (y2 - y1) / length
    bx, by = x2 - 7 * u, y2 - 7 * v
    head = f"{x2:.1f},{y2:.1f} {bx - 3 * v:.1f},{by + 3 * u:.1f} {bx + 3 * v:.1f},{by - 3 * u:.1f}"
    return _line(x1, y1, bx, by, far) + f'<polygon points="{head}" opacity="0.7"/>'


def _line(x1: float, y1: float, x2: float, y2: float, far: bool) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" opacity="0.7" stroke-width="{2.6 if far else 1}"/>'


def _text(x: float, y: float, said: str, colour: str, anchor: str = "middle") -> str:
    paint = f' fill="{colour}" font-weight="600"' if colour else ' opacity="0.75"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{paint}>{escape(said)}</text>'
