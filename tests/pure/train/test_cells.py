"""A job of a notebook cell becomes a file that stands alone."""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import JobError
from shardwise.train import cells

SETUP = "import math\nimport json as j\nfrom collections import OrderedDict\nWIDTH = 8\nOPEN = object()\n"


def run_cell(text: str, number: int, space: dict[str, Any]) -> None:
    """Run a cell as a notebook does: under a file name that exists only in the line cache."""
    name = f"<ipykernel-input-{number}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), space)


def cell_space(*texts: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate((SETUP, *texts)):
        run_cell(text, number, space)
    return space


def test_what_the_job_uses_of_other_cells_comes_along() -> None:
    space = cell_space(
        "class Net:\n    size = WIDTH\n    def area(self):\n        return math.pi * self.size\n",
        "def helper(n):\n    return [Net().area() for _ in range(n)]\n",
        "def job(times: int = WIDTH, table: OrderedDict = None):\n    return j.dumps(helper(times))\n",
    )
    alone: dict[str, Any] = {"__name__": "cell"}
    exec(cells.written(space["job"]), alone)
    assert alone["job"]() == space["job"]()
    assert "OPEN" not in alone


def test_what_cannot_be_written_is_refused_by_name() -> None:
    space = cell_space("def job():\n    return OPEN\n")
    with pytest.raises(JobError, match="OPEN"):
        cells.written(space["job"])


def test_a_lambda_or_nested_job_is_refused() -> None:
    def nested() -> None: ...

    for function in (nested, lambda: None):
        with pytest.raises(JobError, match="top level"):
            cells.source_of(function)


def test_a_function_of_a_file_is_that_file() -> None:
    source = cells.source_of(run_cell)
    assert (Path(source.folder) / source.path).resolve() == Path(__file__).resolve()
    assert source.function == "run_cell"
