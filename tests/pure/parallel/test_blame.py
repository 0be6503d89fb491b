"""The user's line and the shapes in an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from shardwise.errors import DataError, JobError
from shardwise.parallel.blame import name_of, shapes, user_code

SOURCE = """
def inner(x):
    return x["nothing"]

def outer(x):
    import json
    json.loads("{}", object_hook=lambda d: inner(d))
"""


def run(path: Path) -> None:
    path.write_text(SOURCE)
    names: dict[str, object] = {}
    exec(compile(SOURCE, str(path), "exec"), names)
    with user_code("data of the job", folder=str(path.parent), about=lambda: "More."):
        names["outer"]({})  # type: ignore[operator]


def test_the_innermost_line_in_the_users_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        run(tmp_path / "job.py")
    text = str(caught.value)
    line = f'{tmp_path}/job.py:3 in inner (`return x["nothing"]`)'
    assert text == f"data of the job failed at {line}: KeyError: 'nothing'. More."


def test_our_own_errors_pass() -> None:
    with pytest.raises(DataError, match="as it was"), user_code("data"):
        raise DataError("as it was")


def test_an_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt), user_code("data"):
        raise KeyboardInterrupt


def test_a_syntax_error_has_its_own_line() -> None:
    with pytest.raises(JobError, match=r"job\.py:1"), user_code("the job file"):
        compile("def f(:", "/somewhere/job.py", "exec")


def test_shapes_describe_what_is_nested() -> None:
    tensor = SimpleNamespace(shape=(2, 3), dtype="torch.float32")
    assert shapes({"x": tensor, "y": [tensor, 4, None]}) == "{x: float32[2, 3], y: (float32[2, 3], 4, None)}"
    assert shapes([1] * 10) == "(1, 1, 1, 1, 1, 1, ...)"
    assert shapes(object()) == "object"


def test_functions_have_the_name_that_the_user_wrote() -> None:
    class Loss:
        def __call__(self) -> None: ...

        def method(self) -> None: ...

    assert name_of(Loss()) == "Loss"
    assert name_of(Loss().method).endswith("Loss.method")
