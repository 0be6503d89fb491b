"""`shardwise new NAME --from TEMPLATE`: write a small job that runs, to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TEMPLATES = Path(__file__).parent / "templates"
Name = Annotated[str, typer.Argument(metavar="NAME", help="The file to write: NAME.py.")]
From = Annotated[str, typer.Option("--from", metavar="TEMPLATE", help="text, image, finetune or script.")]


def new(name: Name, template: From = "text") -> None:
    """Write a small job that runs as it is, to edit."""
    written = write(name, template)
    typer.echo(f"wrote {written}. Run it with: shardwise train {written}")


def write(name: str, template: str) -> Path:
    """NAME.py from the template. Raises SpecError for an unknown template, RunError if the file is there already."""
    from shardwise.errors import RunError, SpecError, did_you_mean

    known = sorted(path.name.removesuffix(".py.txt") for path in TEMPLATES.glob("*.py.txt"))
    if template not in known:
        raise SpecError(f"--from {template} is not a template{did_you_mean(template, known)}")
    path = Path(name if name.endswith(".py") else f"{name}.py")
    if not path.stem.isidentifier():
        raise SpecError(f"'{path.stem}' cannot be imported by Python. Use letters, digits and _ only, a letter first.")
    text = (TEMPLATES / f"{template}.py.txt").read_text(encoding="utf-8").replace("FILE_NAME", path.name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RunError(f"{path} is there already and is left as it is. Choose another name, or move it away.") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Choose a folder that is there and writable.") from None
    return path
