"""What the command line asks of a benchmark, and how a benchmark talks while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """`only` names the systems to run (empty: all); `rounds` overrides the benchmark's own number.

    `keep` is given the rows so far after each case of a long benchmark, so that what ends it early does not lose them.
    """

    quick: bool = False
    only: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    rounds: int | None = None
    device: str = "cpu"
    run: str | None = None
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None

    def chosen(self, systems: Sequence[str], quick: Sequence[str]) -> list[str]:
        """The systems of `systems` to run, in their order; `quick` is the choice under --quick. Raises SystemExit."""
        unknown = [name for name in self.only if name not in systems]
        if unknown:
            raise SystemExit(f"--only {unknown[0]}: there is no such system here; known: {', '.join(systems)}.")
        wanted = self.only or (quick if self.quick else systems)
        return [name for name in systems if name in wanted]

    def wants(self, case: str) -> bool:
        """Whether a case is to run: all, unless `cases` has words, one of which must be in its name."""
        return not self.cases or any(word in case for word in self.cases)


def say(text: str) -> None:
    """A line of progress on the standard error stream."""
    print(text, file=sys.stderr, flush=True)
