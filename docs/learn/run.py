"""Run a page's Python blocks, in order, in an empty folder: python docs/learn/run.py 01 [--into DIR] [NAME=VALUE ...]

A block that begins with `# name.py` is written to that file; the others share one namespace. NAME=VALUE replaces the
line `NAME = ...` of a block, to try other sizes. With --into the page's pictures are kept in that folder.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


class Block(NamedTuple):
    """A block's text, the line of the page where it starts, and the file that it is (empty for one that runs)."""

    text: str
    line: int
    file: str


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        named = FILE.match(match[1])
        found.append(Block(match[1], text.count("\n", 0, match.start(1)) + 1, named[1] if named else ""))
    return found


def with_values(found: Sequence[Block], values: Sequence[str]) -> list[Block]:
    """The blocks with their `NAME = ...` lines replaced. Exits when no block has such a line."""
    for word in values:
        name, _, value = word.partition("=")
        pattern = re.compile(rf"^{re.escape(name)} = .*$", re.MULTILINE)
        if not any(pattern.search(block.text) for block in found):
            sys.exit(f"{word}: no block of the page has a line '{name} = ...'.")
        found = [block._replace(text=pattern.sub(f"{name} = {value}", block.text)) for block in found]
    return list(found)


def run(page: Path, found: Sequence[Block]) -> None:
    """Run the blocks in the current folder. An error's traceback has the line numbers of the page."""
    space = {"__name__": "__main__"}
    for block in found:
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
            continue
        padded = "\n" * (block.line - 1) + block.text
        exec(compile(padded, str(page), "exec"), space)
        sys.stdout.flush()


def on_paper(picture: str) -> str:
    """An SVG with a background of its own: in a file, unlike in a report, nothing around it gives it a colour."""
    return picture.replace("color:inherit", "color:#1f2328;background:#ffffff") + "\n"


def main() -> None:
    """Find the page by its number or path, run it, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="a page's number, or its path")
    parser.add_argument("values", nargs="*", metavar="NAME=VALUE", help="another size")
    parser.add_argument("--into", type=Path, metavar="DIR", help="keep the page's pictures here")
    told = parser.parse_args()
    numbered = sorted(HERE.glob(f"{told.page}_*.md")) if told.page.isdigit() else []
    page, into = [*numbered, Path(told.page).resolve()][0], told.into.resolve() if told.into else None
    if not page.is_file():
        sys.exit(f"{told.page}: there is no such page in {HERE}.")
    found = with_values(blocks(page), told.values)
    began, before = time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="shardwise-page-", ignore_cleanup_errors=True) as scratch:
        os.chdir(scratch)
        sys.path.insert(0, scratch)
        run(page, found)
        for picture in sorted(Path(scratch).glob("*.svg")) if into else ():
            (into / picture.name).write_text(on_paper(picture.read_text(encoding="utf-8")), encoding="utf-8")
        os.chdir(before)
    print(f"\n{page.name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
