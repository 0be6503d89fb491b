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
    Console(highlight=False).print(shown, soft_wrap=True)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without borders, one line a row, never cut off when the output is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*map(Text, row))
    width = (
        None if sys.stdout.isatty() else 4 + sum(max(map(len, column)) + 2 for column in zip(head, *rows, strict=True))
    )
    Console(width=width, highlight=False).print(table)
