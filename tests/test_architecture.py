"""The map of the house: which room may import which, which rooms live without torch, how big files may grow."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "shardwise"

# Doors open downwards only; rooms on one floor never import each other.
FLOORS = [
    {"errors", "units", "events"},
    {"spec"},
    {"plan", "comm", "models", "data", "compress"},
    {"parallel", "checkpoint", "cluster", "observe"},
    {"train", "serve", "federate", "export", "fleet"},
    {"tune"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_TORCH = ["errors", "units", "events", "spec", "plan", "observe", "cluster", "cli"]
# Launched ranks and the matmul probe set torch's threads; both import it inside a function, in a process of their own.
FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 400, 50, 31_000


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _code_lines(source: str) -> set[int]:
    """Line numbers that hold code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            docstrings |= set(range(body[0].lineno, (body[0].end_lineno or body[0].lineno) + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_doors_open_downwards(path: Path) -> None:
    room = _room(path)
    if room in ("__init__", "__main__"):
        return
    assert room in FLOOR, f"{room} is on no floor of the map"
    for name in _imports(ast.parse(path.read_text())):
        parts = name.split(".")
        assert parts[0] != "recipes", f"{path} imports a recipe"
        if parts[0] != "shardwise":
            continue
        assert len(parts) > 1, f"{path} imports the whole package, through which any room can be reached"
        other = parts[1]
        if other in FLOOR and other != room:
            same_ground = FLOOR[room] == FLOOR[other] == 0
            assert FLOOR[other] < FLOOR[room] or same_ground, f"{path} (floor {FLOOR[room]}) imports {name}"


def test_the_package_hands_names_on_lazily() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = {n for n in _imports(tree) if n.startswith("shardwise.")}
    assert not names, f"shardwise/__init__.py imports {names} at once"


@pytest.mark.parametrize("path", [p for p in _modules() if p.name == "__init__.py" and p.parent != PACKAGE], ids=str)
def test_a_room_has_a_purpose_and_nothing_else_in_its_init(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1, f"{path} holds more than its docstring"
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no purpose"


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    source = path.read_text()
    assert source.isascii(), f"{path} has characters beyond ASCII"
    lines = _code_lines(source)
    limit = 60 if _room(path) == "cli" and path.parent.name == "cli" else FILE_LINES
    assert len(lines) <= limit, f"{path} has {len(lines)} code lines; the limit is {limit}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len([n for n in lines if node.lineno <= n <= (node.end_lineno or node.lineno)])
            assert size <= FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {size} code lines"


def test_the_package_has_a_size() -> None:
    total = sum(len(_code_lines(path.read_text())) for path in _modules())
    assert total <= PACKAGE_LINES, f"{total} code lines"


def test_rooms_without_torch_import_without_it() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in _modules()
        if _room(path) in WITHOUT_TORCH and path.name != "__main__.py"
    ]
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_shardwise_is_quick_and_free_of_torch() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import shardwise; s = time.perf_counter() - t\n"
        "assert 'torch' not in sys.modules and 'typer' not in sys.modules\nprint(s)"
    )
    best = min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout)
        for _ in range(5)
    )
    assert best < 0.05, f"import shardwise took {best:.3f} s"


def test_every_room_has_a_page() -> None:
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    missing = {room for room in rooms if not (ROOT / "docs" / f"{room}.md").exists()}
    assert not missing, f"no page in docs/ for {sorted(missing)}"
