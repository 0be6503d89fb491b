"""Print labelled lines and tables: coloured on a terminal, plain and whole elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_topics(lines: Sequence[str]) -> None:
    """Lines that begin with a label; on a terminal the label is bold. Characters that the output lacks become `?`."""
    text = "\n".join(lines) + "\n"
    if not sys.stdout.isatty():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text(text, end="")
    shown.highlight_regex(r"(?m)^(run|job|plan|data|loss|held out|rate|time|memory|checkpoint|resumed)\b", "bold")
    shown.highlight_regex(r"(?m)^(warning|skipped)\b", "bold yellow")
    shown.highlight_regex(r"(?m)^failed\b", "bold red")
    Console(highlight=False).print(shown, soft_wrap=True, end="")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, one line a row where the output is not a terminal. An empty `head` leaves the headings out."""
    if not sys.stdout.isatty():
        print_topics(aligned([head, *rows] if head else rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False, show_header=bool(head))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines whose columns begin under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
