"""The user's mistakes in a step: one paragraph that names the field, the shapes and the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.parallel.parallelize import Replica, parallelize
from shardwise.parallel.step import evaluate, step
from shardwise.spec.plan import Plan
from tests.cpu.parallel import jobs
from tests.ranks import Rank, RankFailed, run_ranks


def one_step(replica: Replica, batch: Any, loss: Callable[..., Any]) -> None:
    step(replica, [torch.optim.SGD(replica.module.parameters(), lr=0.1)], [jobs.Micro(batch, 0)], loss=loss)


def one_evaluation(replica: Replica, batch: Any, loss: Callable[..., Any]) -> None:
    evaluate(replica, [batch], loss)


def message(module: nn.Module, loss: Callable[..., Any], call: Callable[..., None] = one_step) -> str:
    plan = Plan()
    mesh = Rank(0, 1, None).mesh(plan)
    replica = parallelize(module, plan, mesh)
    batch = jobs.data(0, 4)
    with pytest.raises(JobError) as caught:
        call(replica, batch, loss)
    text = str(caught.value)
    assert "\n" not in text
    assert all(p.grad is None for p in module.parameters())
    return text


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(jobs.FEATURES + 1, jobs.OUTPUTS)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input)


def test_a_model_that_cannot_take_the_batch() -> None:
    text = message(Wrong(), jobs.loss)
    assert text.startswith("the model failed at ")
    assert "return self.layer(input)" in text
    assert re.search(r"test_job_errors\.py:\d+ in forward", text)
    assert "input: float32[4, 6]" in text


def test_a_loss_that_does_not_fit_the_output() -> None:
    def misfit(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return (output - batch["targets"][:, :2]).sum(), 4

    text = message(jobs.net(), misfit)
    assert "loss (test_a_loss_that_does_not_fit_the_output.<locals>.misfit) failed at " in text
    assert "output was float32[4, 3]" in text
    assert "targets: float32[4, 3]" in text
    assert 'batch["targets"][:, :2]' in text


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        (lambda output, batch: output.sum(), r"returned float32\[\]; it must return a pair"),
        (lambda output, batch: (output.sum(), 4, 5), "it must return a pair"),
        (
            lambda output, batch: (output.sum(1), 4),
            r"the sum that loss .* returned is float32\[4\]; it must be one number",
        ),
        (lambda output, batch: (output.sum(), batch["counts"]), r"the weight that loss .* returned is float32\[4\]"),
        (lambda output, batch: ("low", 4), "the sum that loss .* returned is str"),
        (lambda output, batch: (output.detach().sum(), 4), "does not depend on any parameter"),
        (lambda output, batch: {}["missing"], "KeyError: 'missing'"),
    ],
)
def test_a_loss_that_breaks_its_contract(loss: Callable[..., Any], part: str) -> None:
    assert re.search(part, message(jobs.net(), loss))


def test_evaluation_names_the_metric() -> None:
    assert "loss (" in message(jobs.net(), lambda output, batch: 3, call=one_evaluation)
    assert "counted nothing" in message(jobs.net(), lambda output, batch: (output.sum(), 0), call=one_evaluation)


def test_sparse_gradients_are_refused_by_name() -> None:
    def sparse(rank: Rank) -> None:
        plan = Plan(data=rank.world)
        module = nn.Sequential(nn.Embedding(10, 3, sparse=True))
        replica = parallelize(module, plan, rank.mesh(plan))
        batch = {"input": torch.tensor([1, 2])}
        step(replica, [], [jobs.Micro(batch, 0)], loss=lambda output, batch: (output.sum(), len(output)))

    with pytest.raises(RankFailed, match=r"JobError: the gradient of '0.weight' is sparse.*sparse=False"):
        run_ranks(2, sparse)


def test_unlike_modules_are_refused() -> None:
    def unlike(rank: Rank) -> None:
        plan = Plan(data=rank.world)
        parallelize(nn.Linear(3, 2 + rank.rank), plan, rank.mesh(plan))

    with pytest.raises(RankFailed, match="JobError: model of the job builds different modules on different ranks"):
        run_ranks(2, unlike)


def test_a_second_backward_before_synchronise_is_refused() -> None:
    def twice(rank: Rank) -> None:
        plan = Plan(data=rank.world)
        module = jobs.net()
        replica = parallelize(module, plan, rank.mesh(plan))
        for _ in range(2):
            module(torch.ones(1, jobs.FEATURES)).sum().backward()
        replica.synchronise()

    with pytest.raises(RankFailed, match="JobError: the gradient of .* arrived again"):
        run_ranks(2, twice)


def test_what_the_plan_asks_and_no_runtime_has_is_refused() -> None:
    with pytest.raises(RankFailed, match="context=2, which this version cannot run yet"):
        run_ranks(2, lambda rank: parallelize(jobs.net(), plan := Plan(context=2), rank.mesh(plan)))
