"""Which synchronisation goes with what: the table is on its page, and what is not in it is refused.

`python -m tests.pure.plan.test_sync_table` writes the table into the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import SpecError
from shardwise.plan.support import refuse_unbuilt
from shardwise.plan.synchronisations import FEATURES, SYNCHRONISATIONS, name, refuse_together, refuse_unallowed
from shardwise.spec.plan import Plan
from shardwise.spec.sync import LOSSY, METHODS, Sync

PAGE = Path(__file__).parents[3] / "docs" / "synchronisation.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def table() -> str:
    head = ["synchronisation", *(feature.replace("_", " ") for feature in FEATURES)]
    rows = [head, ["---"] * len(head)]
    rows += [
        [f"`{name(*key)}`", *("yes" if f in cells else "-" for f in FEATURES)]
        for key, cells in SYNCHRONISATIONS.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


def sync_of(word: Any, method: str) -> Sync:
    if method == "backup":
        return Sync(word=word, method="sync", backup=1)
    return Sync(word=word, method=method, start=3 if method == "post_local" else 0)


CELLS = [(key, feature) for key in SYNCHRONISATIONS for feature in FEATURES]


@pytest.mark.parametrize(("key", "feature"), CELLS)
def test_what_is_not_in_the_table_is_refused(key: tuple[str, str], feature: str) -> None:
    asked: dict[str, dict[str, Any]] = {
        "exact": {"exact": True},
        "float16": {"precision": "float16"},
        "microbatches": {"microbatches": 2},
        "pipeline": {"pipeline": 2},
        "shard": {"shard": 2},
        "tensor": {"tensor": 2},
    }
    plan = Plan(data=2, sync=sync_of(*key), **asked.get(feature, {}))
    shown = feature in SYNCHRONISATIONS[key]
    for refuse in (
        lambda: refuse_together(plan, feature, "it"),
        *([lambda: refuse_unbuilt(plan)] * (feature in asked)),
    ):
        if shown:
            refuse()
        else:
            with pytest.raises(SpecError, match="does not go with sync="):
                refuse()


@pytest.mark.parametrize("key", [(word, method) for word in METHODS for method in METHODS[word]])
def test_every_method_is_in_the_table_or_refused(key: tuple[str, str]) -> None:
    plan = Plan(data=2, sync=sync_of(*key))
    if key in SYNCHRONISATIONS:
        refuse_unbuilt(plan)
    else:
        with pytest.raises(SpecError, match="cannot run yet"):
            refuse_unbuilt(plan)


@pytest.mark.parametrize("word", LOSSY)
def test_what_changes_the_numbers_must_be_allowed(word: Any) -> None:
    sync = Sync(word=word, method="async" if word == "param_server" else "")
    with pytest.raises(SpecError, match=f"Add '{word}'"):
        refuse_unallowed(Plan(data=2, sync=sync), ())
    refuse_unallowed(Plan(data=2, sync=sync), (word,))


def test_what_keeps_the_numbers_needs_no_leave() -> None:
    for sync in (Sync(), Sync(word="param_server"), Sync(word="auto")):
        refuse_unallowed(Plan(data=2, sync=sync), ())


if __name__ == "__main__":
    written = PAGE.read_text()
    PAGE.write_text(written[: written.index(BEGIN) + len(BEGIN)] + table() + written[written.index(END) :])
