"""The job function is what is kept: find it, bind its parameters, copy its source, and load it from the copy."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import msgspec

from shardwise.errors import JobError, did_you_mean
from shardwise.spec.job import TrainJob

LARGEST_SOURCE = 1_000_000  # bytes of one file; more is not source
MODULE = "shardwise_job"  # what the job's file is called in `sys.modules`, where its own name may be taken


class JobSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job's function is: `path` inside `folder`, and the name of the function. Saved in `job.json`."""

    folder: str
    path: str
    function: str


def find_job(where: str) -> JobSource | None:
    """`FILE.py` or `FILE.py:function` -> its job function, found without running the file; None for a plain script.

    The function is the named one, else one called `job`, else the only one annotated `-> TrainJob`.
    Raises JobError for a missing file, a syntax error, or several candidates.
    """
    name, colon, function = where.rpartition(":")
    path = Path(name if colon and not function.endswith(".py") else where)
    function = function if path == Path(name) and colon else ""
    if not path.is_file():
        raise JobError(
            f"there is no job file {path}. Give the path of a Python file, or write one: shardwise new NAME."
        )
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        raise JobError(f"{path}:{error.lineno}: {error.msg}. Correct the job file and try again.") from None
    except UnicodeDecodeError:
        raise JobError(f"{path} is not a Python file: it is not UTF-8 text.") from None
    functions = {
        n.name: ast.unparse(n.returns) if n.returns else "" for n in tree.body if isinstance(n, ast.FunctionDef)
    }
    if not function:
        annotated = [name for name, returns in functions.items() if returns.split(".")[-1].strip("'\"") == "TrainJob"]
        found = ["job"] if "job" in functions else annotated
        if len(found) > 1:
            raise JobError(f"{path} has several jobs: {', '.join(found)}. Choose one: {path}:{found[0]}.")
        if not found:
            return None
        function = found[0]
    if function not in functions:
        raise JobError(f"{path} has no function '{function}'{did_you_mean(function, functions)}")
    return JobSource(folder=str(path.resolve().parent), path=path.name, function=function)


def load_function(source: JobSource, *, original: str = "") -> Callable[..., TrainJob]:
    """Import the job's file, its folder first on `sys.path`, and return the function. Raises JobError with the line.

    `original` is where a kept copy came from: its `__file__`, so that it finds what lies beside it.
    """
    path = Path(source.folder) / source.path
    _forget_others(source)
    sys.path[:] = [source.folder, *(entry for entry in sys.path if entry != source.folder)]
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    module.__file__ = original or str(path)
    sys.modules[MODULE] = module
    from shardwise.parallel.blame import user_code

    with user_code(f"the job file {path.name}", folder=source.folder):
        spec.loader.exec_module(module)
    function = getattr(module, source.function, None)
    if not callable(function):
        raise JobError(f"{source.function} of {path} is {function!r}; it must be a function that returns a TrainJob.")
    return typing.cast("Callable[..., TrainJob]", function)


def bind(function: Callable[..., Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """The job's resolved parameters: its defaults, overridden by `sets`, whose strings become the annotated types."""
    signature = inspect.signature(function)
    try:
        hints = typing.get_type_hints(function)
    except NameError:
        hints = {}
    unknown = [name for name in sets if name not in signature.parameters]
    if unknown:
        raise JobError(f"the job has no parameter '{unknown[0]}'{did_you_mean(unknown[0], signature.parameters)}")
    values: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name in sets:
            values[name] = _typed(name, sets[name], hints.get(name), parameter.default)
        elif parameter.default is inspect.Parameter.empty:
            raise JobError(f"the job's parameter '{name}' has no default. Give it with --set {name}=VALUE.")
        else:
            values[name] = parameter.default
    return values


def build(function: Callable[..., Any], values: Mapping[str, Any], *, folder: str) -> TrainJob:
    """Call the job function. Raises JobError when it fails or returns something else."""
    from shardwise.parallel.blame import user_code

    with user_code(f"the job function {function.__name__}", folder=folder):
        job = function(**values)
    if not isinstance(job, TrainJob):
        raise JobError(
            f"the job function {function.__name__} returned {type(job).__name__}; it must return a TrainJob."
        )
    return job


def parse_sets(sets: Sequence[str]) -> dict[str, str]:
    """`["lr=3e-4"]` -> `{"lr": "3e-4"}`."""
    found: dict[str, str] = {}
    for word in sets:
        name, equals, value = word.partition("=")
        if not equals:
            raise JobError(f"--set {word} has no value. Write --set NAME=VALUE, such as --set lr=3e-4.")
        found[name.strip()] = value
    return found


def local_sources(source: JobSource) -> dict[str, str]:
    """The text of the job's file and of every module that it imports from its own folder, by relative path.

    Found by reading the import statements, so that it does not depend on what happened to be imported.
    """
    folder = Path(source.folder)
    found: dict[str, str] = {}
    pending = [Path(source.path)]
    while pending:
        name = pending.pop()
        file = folder / name
        if str(name) in found or file.stat().st_size > LARGEST_SOURCE:
            continue
        found[str(name)] = file.read_text(encoding="utf-8")
        pending += _imported(found[str(name)], folder, name.parent)
    return found


def _imported(text: str, folder: Path, inside: Path) -> list[Path]:
    """Files of `folder` that a module in its subfolder `inside` imports."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []  # importing it says what is wrong
    wanted: list[tuple[Path, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted += [(Path(), alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = Path(*inside.parts[: len(inside.parts) - node.level + 1]) if node.level else Path()
            wanted += [(base, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names]
    files: list[Path] = []
    for base, dotted in wanted:
        parts = dotted.split(".")
        if parts[0] == "shardwise":
            continue
        for depth in range(1, len(parts) + 1):
            place = base.joinpath(*parts[:depth])
            files += [f for f in (place.with_suffix(".py"), place / "__init__.py") if (folder / f).is_file()]
    return files


def _forget_others(source: JobSource) -> None:
    """Modules of the same names that another run's folder gave this process must not stand in for the job's own."""
    names = {Path(name).parts[0].removesuffix(".py") for name in local_sources(source)}
    ours = (sys.prefix, sys.base_prefix)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] in names and file and not file.startswith((*ours, source.folder)):
            del sys.modules[name]


def digest(sources: Mapping[str, str]) -> str:
    """SHA-256 over the names and texts of the job's sources."""
    whole = hashlib.sha256()
    for name in sorted(sources):
        whole.update(f"{name}\0{sources[name]}\0".encode())
    return whole.hexdigest()


def _typed(name: str, value: Any, hint: Any, default: Any) -> Any:
    """`value`, a string of the command line or plain data of a record, as what the parameter is annotated with."""
    if hint is None and default in (None, inspect.Parameter.empty):
        return value
    hint = type(default) if hint is None else hint
    nullable = default is None or type(None) in typing.get_args(hint)
    if nullable and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    try:
        if isinstance(value, str) and value[:1] in ("[", "{") and hint is not str:
            value = msgspec.json.decode(value)  # --set sizes=[3,4]
        return msgspec.convert(value, hint, strict=False, dec_hook=_path)
    except (msgspec.DecodeError, TypeError, NotImplementedError):
        kind = getattr(hint, "__name__", str(hint))
        raise JobError(
            f"--set {name}={value}: the job's parameter '{name}' is {kind}, and '{value}' is not one."
        ) from None


def _path(kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return kind(value)
    raise NotImplementedError(f"a parameter of type {kind}")
