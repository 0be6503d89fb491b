"""A job defined in a notebook cell or at a prompt, written out as a file that stands alone."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import linecache
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwise.errors import JobError
from shardwise.train.capture import JobSource

PLAIN = (int, float, str, bool, bytes, type(None), tuple, list, dict)


def source_of(function: Callable[..., Any]) -> JobSource:
    """Where a job function is: its file, or a file made of its cell and of what it uses from other cells.

    Raises JobError for a lambda, a nested function, or a name that cannot be written as source.
    """
    name = function.__name__
    if name == "<lambda>" or "<locals>" in function.__qualname__:
        raise JobError(
            f"the job {function.__qualname__} cannot be imported by another process. Define it at the top level."
        )
    file = inspect.getsourcefile(function)
    if file and Path(file).is_file() and not _is_cell(file):
        return JobSource(folder=str(Path(file).resolve().parent), path=Path(file).name, function=name)
    folder = tempfile.mkdtemp(prefix="shardwise-cell-")
    (Path(folder) / "cell.py").write_text(written(function), encoding="utf-8")
    return JobSource(folder=folder, path="cell.py", function=name)


def written(function: Callable[..., Any]) -> str:
    """The text of a module that defines `function` and everything that it uses from its own namespace."""
    parts: dict[str, str] = {}
    _define(function.__name__, function, function.__globals__, parts, asked_by=function.__name__)
    return "\n\n".join(parts.values()) + "\n"


def _define(name: str, value: Any, space: dict[str, Any], parts: dict[str, str], *, asked_by: str) -> None:
    if name in parts:
        return
    if isinstance(value, types.ModuleType):
        parts[name] = f"import {value.__name__} as {name}"
    elif _importable(value, space):
        parts[name] = f"from {value.__module__} import {value.__qualname__} as {name}"
    elif inspect.isfunction(value) or inspect.isclass(value):
        parts[name] = ""  # a place in the order of names, in case it uses itself
        for used in sorted(_names(value)):
            if used in space and used not in vars(builtins):
                _define(used, space[used], space, parts, asked_by=name)
        del parts[name]
        parts[name] = _text(value, name)
    elif isinstance(value, PLAIN):
        parts[name] = f"{name} = {value!r}"
    else:
        raise JobError(
            f"the job uses {name} ({type(value).__name__}, in {asked_by}), which lives only in this notebook. "
            f"Build it inside the job function."
        )


def _text(value: Any, name: str) -> str:
    try:
        return _class_text(value) if inspect.isclass(value) else textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        raise JobError(f"the source of {name} is not known. Put the job into a file and give its path.") from None


def _importable(value: Any, space: dict[str, Any]) -> bool:
    """Whether another process finds this very object in an installed module: functions, classes, builtins."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not module or not name.isidentifier() or module == space.get("__name__"):
        return False
    return getattr(sys.modules.get(module), name, None) is value


def _class_text(value: type) -> str:
    """A class does not know its cell; the newest cell that defines one of that name has it. Raises OSError."""
    cells = [name for name in linecache.cache if _is_cell(name)]
    for name in reversed(cells):
        lines = linecache.getlines(name)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, ast.ClassDef) and node.name == value.__name__:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                return "".join(lines[first - 1 : node.end_lineno])
    return inspect.getsource(value)


def _names(value: Any) -> set[str]:
    """Every global name that the code of a function, or of a class and its methods, may look up."""
    if inspect.isclass(value):
        tree = ast.parse(_text(value, value.__name__))
        return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found: set[str] = set()
    pending = [value.__code__]
    while pending:
        code = pending.pop()
        found |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        pending += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return found | _head_names(value)


def _head_names(function: Any) -> set[str]:
    tree = ast.parse(_text(function, function.__name__))
    head = tree.body[0]
    assert isinstance(head, ast.FunctionDef)
    outside = [*head.args.defaults, *filter(None, head.args.kw_defaults), *head.decorator_list]
    outside += [a.annotation for a in (*head.args.args, *head.args.kwonlyargs) if a.annotation]
    outside += [head.returns] if head.returns else []
    return {node.id for part in outside for node in ast.walk(part) if isinstance(node, ast.Name)}


def _is_cell(file: str) -> bool:
    return "ipykernel" in file or file.startswith("<")
