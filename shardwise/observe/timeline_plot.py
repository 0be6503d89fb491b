"""A recorded step as a picture: a row for each rank, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shardwise.observe.svg import ticks
from shardwise.observe.timeline import COMPUTING, KINDS, NAMES, Piece, Row, StepTimeline
from shardwise.units import format_seconds

WIDTH, LEFT, RIGHT, TOP, ROW = 640, 52, 88, 30, 26
MOST_PIECES = 400  # of a row; more of them are drawn as what most of each half a pixel is
MOST_ROWS = 16
NUMBERED = 6.5  # pixels that a digit of a microbatch's number needs
SEEN = 0.1  # pixels; what is narrower is not drawn
COLOURS = {
    "forward": "#3b82f6",
    "backward": "#10b981",
    "weights": "#84cc16",
    "communication": "#ef4444",
    "optimizer": "#8b5cf6",
    "idle": "#94a3b8",
}


def timeline_plot(step: StepTimeline, title: str = "") -> str:
    """SVG. Boxes are numbered by microbatch; the second and later stages of a rank are framed. Beside each row the
    rank's bubble, or where the model is whole how long it was idle."""
    title = title or f"step {step.step}: what each rank did"
    rows = step.rows[:MOST_ROWS]
    scale = (WIDTH - LEFT - RIGHT) / (step.seconds or 1.0)
    bottom = TOP + ROW * len(rows)
    parts = [_row(row, TOP + ROW * index, scale, staged=step.staged) for index, row in enumerate(rows)]
    for value in ticks(0.0, 1e3 * step.seconds, 6):
        x = LEFT + value / 1e3 * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="currentColor"/>')
        parts.append(_text(x, bottom + 16, f"{value:g}", "middle"))
    parts.append(_text(WIDTH - RIGHT + 6, bottom + 16, "ms", "start"))
    if len(rows) < len(step.rows):
        parts.append(_text(LEFT, bottom + 32, f"and {len(step.rows) - len(rows)} more ranks", "start"))
        bottom += 16
    drawn = {piece.kind for row in rows for piece in row.pieces}
    parts += _legend([kind for kind in KINDS if kind in drawn], bottom + 38)
    style = f'style="width:100%;max-width:{WIDTH}px;color:inherit;font:12px system-ui,sans-serif" fill="currentColor"'
    view = f'viewBox="0 0 {WIDTH} {bottom + 46}" role="img" aria-label="{escape(title)}"'
    head = f'<text x="4" y="18" font-weight="600">{escape(title)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view} {style}>{head}{"".join(parts)}</svg>'


def coarse(pieces: Sequence[Piece], seconds: float, columns: int) -> list[Piece]:
    """At most `columns` pieces: in each of so many equal parts of the time what took most of it."""
    size = seconds / columns
    found: list[Piece] = []
    spent: dict[str, float] = {}
    at, limit = pieces[0].begin, pieces[0].begin + size

    def close(moment: float) -> None:
        nonlocal at
        if spent and moment > at:
            kind = max(spent, key=lambda one: spent[one])
            if found and found[-1].kind == kind:
                found[-1] = found[-1]._replace(end=moment)
            else:
                found.append(Piece(kind, 0, 0, at, moment))
            at = moment
        spent.clear()

    for piece in pieces:
        begin = piece.begin
        while piece.end > limit:
            spent[piece.kind] = spent.get(piece.kind, 0.0) + max(0.0, limit - begin)
            close(limit)
            begin, limit = limit, limit + size
        spent[piece.kind] = spent.get(piece.kind, 0.0) + piece.end - begin
    close(pieces[-1].end)
    return found


def _row(row: Row, y: float, scale: float, *, staged: bool) -> str:
    pieces: Sequence[Piece] = row.pieces
    if len(pieces) > MOST_PIECES:
        pieces = coarse(pieces, row.seconds, MOST_PIECES)
    first = min((piece.stage for piece in pieces if piece.kind in COMPUTING), default=0)
    seen = [piece for piece in pieces if (piece.end - piece.begin) * scale >= SEEN]
    boxes = [_box(piece, y, scale, framed=piece.kind in COMPUTING and piece.stage > first) for piece in seen]
    beside = f"bubble {_percent(row.bubble)}" if staged else f"idle {_percent(row.totals['idle'] / row.seconds)}"
    return "".join(
        [_text(LEFT - 6, y + 16, f"rank {row.rank}", "end"), *boxes, _text(WIDTH - RIGHT + 6, y + 16, beside, "start")]
    )


def _box(piece: Piece, y: float, scale: float, *, framed: bool) -> str:
    x, width = LEFT + piece.begin * scale, (piece.end - piece.begin) * scale
    computing = piece.kind in COMPUTING
    where = f", stage {piece.stage}, microbatch {piece.micro}" if computing else ""
    said = f"{NAMES.get(piece.kind, piece.kind)}{where}: {format_seconds(piece.end - piece.begin)}"
    idle = piece.kind == "idle"
    place = f'x="{x:.2f}" y="{y + (8 if idle else 3)}" width="{width:.2f}" height="{ROW - (16 if idle else 6)}"'
    opacity = ' opacity="0.3"' if idle else ""
    frame = ' stroke="currentColor" stroke-width="0.8"' if framed else ""
    box = f'<rect {place} fill="{COLOURS[piece.kind]}"{opacity}{frame}><title>{escape(said)}</title></rect>'
    if not computing or width < NUMBERED * len(str(piece.micro)):
        return box
    at = f'x="{x + width / 2:.1f}" y="{y + 17}" text-anchor="middle"'
    return f'{box}<text {at} font-size="10" fill="#ffffff">{piece.micro}</text>'


def _legend(kinds: Sequence[str], y: float) -> list[str]:
    parts, at = [], float(LEFT)
    for kind in kinds:
        name = NAMES.get(kind, kind)
        opacity = ' opacity="0.3"' if kind == "idle" else ""
        box = f'<rect x="{at:.1f}" y="{y - 9}" width="10" height="10" rx="2" fill="{COLOURS[kind]}"{opacity}/>'
        parts.append(box + _text(at + 15, y, name, "start"))
        at += 6.5 * len(name) + 30
    return parts


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _text(x: float, y: float, said: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" opacity="0.85">{escape(said)}</text>'
