"""Whole runs with every word of synchronisation: the cells of the table that a run shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import ClusterError, SpecError
from shardwise.plan.synchronisations import SYNCHRONISATIONS, name
from tests.cpu.train.test_train import losses, named, weights

Train = Callable[..., Any]

NUMBERS = {  # small enough that a run of 12 steps meets several times
    "int8": "sync.overlap=1",
    "powersgd": "sync.rank=1",
    "topk": "sync.density=0.1",
    "sgd": "sync.every=3",
    "post_local": "sync.every=3,sync.start=2",
    "diloco": "sync.every=3",
    "stale": "sync.bound=2",
    "sparse": "sync.every=3,sync.density=0.2",
    "streaming": "sync.every=3,sync.fragments=2,sync.overlap=1",
}
LOSSY = [key for key in SYNCHRONISATIONS if key[0] != "all_reduce"]
FIRST = {word: method for word, method in reversed(LOSSY)}  # the others of a word take their time


def cells(*features: str) -> list[Any]:
    return [
        pytest.param(*key, marks=[] if FIRST[key[0]] == key[1] else [pytest.mark.slow])
        for key in LOSSY
        if set(features) <= set(SYNCHRONISATIONS[key])
    ]


def plan_of(word: str, method: str, ranks: int = 2) -> str:
    return ",".join(filter(None, [f"data={ranks}", name(word, method), NUMBERS.get(method, "")]))


def clip_of(method: str) -> dict[str, float]:
    """Where ranks go by clocks of their own, nobody knows the norm of the whole gradient."""
    return {"clip": 0.0} if method in ("async", "stale", "backup") else {}


@pytest.mark.parametrize(("word", "method"), cells("resume"))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    word: str, method: str, trained: Train, tmp_path: Path
) -> None:
    flag, plan = str(tmp_path / "killed"), plan_of(word, method)
    whole = trained(plan=plan, allow=word)
    assert len(losses(whole.path)) == 12
    with pytest.raises(ClusterError):
        trained(plan=plan, allow=word, die_at=7, flag=flag)
    went_on = trained(plan=plan, resume="latest")
    for tensor_name, tensor in weights(whole.path).items():
        torch.testing.assert_close(weights(went_on.path)[tensor_name], tensor, rtol=1e-5, atol=1e-6)
    evaluated = [e["loss"] for e in named(whole.path, "evaluation")]
    assert evaluated[-1] < evaluated[0]
    assert named(went_on.path, "evaluation")[-1]["loss"] == pytest.approx(evaluated[-1], rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(("word", "method"), cells("other_ranks"))
def test_a_killed_run_goes_on_with_another_number_of_ranks(
    word: str, method: str, before: int, after: int, trained: Train, tmp_path: Path
) -> None:
    flag = str(tmp_path / "killed")
    with pytest.raises(ClusterError):
        trained(plan=plan_of(word, method, before), allow=word, die_at=7, flag=flag, **clip_of(method))
    went_on = trained(plan=plan_of(word, method, after), resume="latest")
    assert named(went_on.path, "resumed")[0]["step"] == 4
    evaluated = [e["loss"] for e in named(went_on.path, "evaluation")]
    assert evaluated[-1] < evaluated[0]


@pytest.mark.parametrize("word", sorted({word for word, _ in LOSSY} - {"auto"}))
def test_what_changes_the_numbers_must_be_allowed(word: str, trained: Train) -> None:
    method = "async" if word == "param_server" else ""
    with pytest.raises(SpecError, match="does not allow"):
        trained(plan=plan_of(word, method))
