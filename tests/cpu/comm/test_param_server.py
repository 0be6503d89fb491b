"""The parameter server on real ranks: every mode against arithmetic, bounds under random delays, deaths, limits."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.comm.group import Group
from shardwise.comm.kernel import library
from shardwise.comm.param_server import ParameterServer
from shardwise.errors import CommError, SpecError
from tests.ranks import Rank, RankFailed, run_ranks

CLOCKS = 6
REST_S = 0.3  # of rank 0, while the others go as far ahead as they may


@pytest.fixture(autouse=True, params=["gloo", "shm"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks inherit it."""
    if request.param == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    monkeypatch.setenv("SHARDWISE_TRANSPORT", request.param)


def group_of(rank: Rank, **settings: Any) -> Group:
    group = rank.mesh(**settings).axis("data").group
    assert group is not None
    return group


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 2, bias=False), nn.LayerNorm(2)).double()


def batch(clock: int, worker: int) -> tuple[Tensor, Tensor]:
    """Workers have unlike numbers of samples."""
    g = torch.Generator().manual_seed(10 * clock + worker)
    samples = 2 + worker
    return torch.randn(samples, 6, generator=g, dtype=torch.float64), torch.randn(
        samples, 2, generator=g, dtype=torch.float64
    )


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def alone(workers: int, optimizer: str, clocks: int = CLOCKS) -> list[Tensor]:
    """One process with every worker's samples."""
    model = net()
    step = MAKERS[optimizer](model.parameters())
    for clock in range(clocks):
        batches = [batch(clock, worker) for worker in range(workers)]
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        step.zero_grad()
        ((model(inputs) - targets) ** 2).sum(1).mean().backward()
        step.step()
    return [p.detach() for p in model.parameters()]


def train(rank: Rank, optimizer: str, options: dict[str, Any]) -> tuple[list[Tensor], list[tuple[int, float, float]]]:
    group = group_of(rank)
    model = net()
    if rank.rank != options.get("servers", (0,))[0]:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)  # the first server's values count
    served = ParameterServer(
        dict(model.named_parameters()), group, optimizer=MAKERS[optimizer], bucket_bytes=1000, **options
    )
    workers = options.get("workers") or range(rank.world)
    if rank.rank not in workers:
        served.serve()
        return [], []
    with served:
        for clock in range(CLOCKS):
            assert served.pull()
            inputs, targets = batch(clock, list(workers).index(rank.rank))
            loss = ((model(inputs) - targets) ** 2).sum(1).mean()
            loss.backward()
            served.push(loss.item() * len(inputs), len(inputs))
            assert all(p.grad is None for p in model.parameters())
        served.drain()
        served.drain()
    return [p.detach() for p in model.parameters()], [tuple(total) for total in served.totals]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("ranks", "optimizer", "options"),
    [
        pytest.param(2, "momentum", {}, marks=pytest.mark.slow),
        (3, "adamw", {}),
        (2, "adafactor", {"cut": False}),
        (2, "adamw", {"method": "stale"}),
        pytest.param(3, "momentum", {"method": "stale"}, marks=pytest.mark.slow),
        (3, "adamw", {"workers": (0, 1), "servers": (2,)}),
        (3, "momentum", {"workers": (0, 2), "servers": (1, 0)}),
        (3, "adafactor", {"workers": (1, 2), "servers": (0, 1), "cut": False}),
    ],
)
def test_synchronous_training_is_that_of_one_process(ranks: int, optimizer: str, options: dict[str, Any]) -> None:
    workers = options.get("workers") or tuple(range(ranks))
    expected = alone(len(workers), optimizer)
    results = run_ranks(ranks, train, optimizer, options)
    for worker in workers:
        found, totals = results[worker]
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
        assert [clock for clock, _, _ in totals] == list(range(CLOCKS))
        assert {weight for _, _, weight in totals} == {sum(2 + w for w in range(len(workers)))}


def counters(rank: Rank, options: dict[str, Any], clocks: int, slow: int | None) -> dict[str, Any]:
    """Element w of the one parameter counts worker w's pushes, 1 / workers each: who saw what, and when it pushed."""
    group = group_of(rank)
    element = torch.zeros(rank.world, dtype=torch.float64)
    served = ParameterServer({"x": element}, group, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **options)
    draw = random.Random(rank.rank)
    seen: list[list[float]] = []
    started: list[float] = []
    pushed: list[float] = []
    counted: list[bool] = []
    with served:
        for clock in range(clocks):
            if not served.pull():
                counted.append(False)
                continue
            started.append(time.monotonic())
            seen.append(element.tolist())
            time.sleep(draw.choice([0, 0, 0.002, 0.01]) if slow is None else 0.05 * (slow == rank.rank))
            if slow is None and clock == clocks // 2 and rank.rank == 0:
                time.sleep(REST_S)
            element.grad = torch.zeros(rank.world, dtype=torch.float64)
            element.grad[rank.rank] = -1.0
            pushed.append(time.monotonic())
            counted.append(served.push(weight=1.0))
        served.drain()
        last = element.tolist()
    return {"seen": seen, "started": started, "pushed": pushed, "counted": counted, "last": last}


@pytest.mark.parametrize(("ranks", "bound"), [(2, 0), (3, 1), (3, 4)])
def test_nobody_starts_a_clock_before_its_bound_allows_it(ranks: int, bound: int) -> None:
    clocks = 40
    found = run_ranks(ranks, counters, {"method": "stale", "bound": bound}, clocks, None)
    ahead = 0
    for mine in found:
        for clock in range(clocks):
            applied = round(mine["seen"][clock][0] * ranks)
            assert mine["seen"][clock] == pytest.approx([applied / ranks] * ranks), "a clock is applied whole"
            assert clock - bound <= applied <= clock
            ahead = max(ahead, clock - applied)
            for other in found:
                if clock > bound:
                    assert other["pushed"][clock - bound - 1] <= mine["started"][clock], "started too early"
        assert mine["last"] == pytest.approx([clocks / ranks] * ranks)
    assert ahead == bound, "the bound was never used"


@pytest.mark.parametrize("ranks", [2, 3])
def test_asynchronous_updates_apply_every_push_exactly_once(ranks: int) -> None:
    clocks = 40
    found = run_ranks(ranks, counters, {"method": "async"}, clocks, None)
    for mine in found:
        assert mine["last"] == pytest.approx([clocks / ranks] * ranks), "lost or doubled"
    for rank, mine in enumerate(found):
        own = [seen[rank] * ranks for seen in mine["seen"]]
        assert own == pytest.approx(range(clocks)), "a worker sees its own pushes at once"


def test_backup_workers_drop_late_gradients() -> None:
    clocks = 12
    found = run_ranks(3, counters, {"backup": 1}, clocks, 2)
    counts = [sum(mine["counted"]) for mine in found]
    assert sum(counts) == 2 * clocks, "of three gradients a clock two count"
    assert counts[2] < clocks / 2, "the slow worker is the late one"
    for mine in found:
        assert len(mine["counted"]) == clocks
        assert mine["last"] == pytest.approx([count / 2 for count in counts])


# torch says it once in every process that makes a sparse tensor, and its own SparseAdam does
SPARSE_NOTICE = "Sparse invariant checks are implicitly disabled"


def rows_of(rank: Rank, kind: str, method: dict[str, Any], whole: bool) -> tuple[Tensor, Tensor, int]:
    warnings.filterwarnings("ignore", SPARSE_NOTICE)
    group = group_of(rank)
    torch.manual_seed(1)
    table = nn.Embedding(50, 4, sparse=True).double()
    out = nn.Linear(4, 1).double()
    named = {"table": table.weight, "out.weight": out.weight, "out.bias": out.bias}
    served = ParameterServer(
        named,
        group,
        optimizer=lambda p: _sparse_optimizer(kind, p),
        tables=["table"],
        **method,
    )
    with served:
        for clock in range(CLOCKS):
            at = words(clock, rank.rank)
            served.pull(None if whole else {"table": at.flatten()})
            loss = out(table(at).sum(1)).square().mean()
            loss.backward()
            served.push(weight=len(at))
        served.drain()
    moved = sum(moved for _, moved in group.wire.values())
    return table.weight.detach(), out.weight.detach(), moved


class Both(torch.optim.Optimizer):
    """SparseAdam for the table, SGD for the rest: what one optimizer cannot do."""

    def __init__(self, params: list[Tensor]) -> None:
        wide = [p for p in params if p.dim() == 2 and p.shape[1] == 4 and p.shape[0] > 1]
        rest = [p for p in params if all(p is not w for w in wide)]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.SGD(rest, lr=0.1)] if rest else []
        self.parts += [torch.optim.SparseAdam(wide, lr=0.1)] if wide else []
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _sparse_optimizer(kind: str, params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.3) if kind == "sgd" else Both(params)


def words(clock: int, worker: int) -> Tensor:
    g = torch.Generator().manual_seed(100 * clock + worker)
    return torch.randint(0, 50, (3 + worker, 5), generator=g)


@pytest.mark.filterwarnings(f"ignore:{SPARSE_NOTICE}")
@pytest.mark.parametrize(
    ("ranks", "kind", "method", "whole"),
    [
        (2, "sgd", {}, True),
        (3, "adam", {}, False),
        (2, "adam", {"method": "stale"}, True),
        (3, "sgd", {"servers": (2,)}, False),
    ],
)
def test_sparse_rows_are_updated_as_in_one_process(ranks: int, kind: str, method: dict[str, Any], whole: bool) -> None:
    torch.manual_seed(1)
    table = nn.Embedding(50, 4, sparse=True).double()
    out = nn.Linear(4, 1).double()
    optimizer = _sparse_optimizer(kind, [table.weight, out.weight, out.bias])
    for clock in range(CLOCKS):
        optimizer.zero_grad()
        at = [words(clock, worker) for worker in range(ranks)]
        each = torch.cat([out(table(rows).sum(1)).square() for rows in at])
        each.mean().backward()
        optimizer.step()
    for found_table, found_out, _ in run_ranks(ranks, rows_of, kind, method, whole):
        torch.testing.assert_close(found_table, table.weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found_out, out.weight.detach(), rtol=1e-9, atol=1e-12)


def only_rows_travel(rank: Rank, sparse: bool) -> int:
    group = group_of(rank)
    table = nn.Embedding(20_000, 16, sparse=sparse)
    served = ParameterServer(
        {"table": table.weight},
        group,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        tables=["table"] if sparse else [],
        method="stale",
        bound=1,
    )
    with served:
        for clock in range(3):
            at = words(clock, rank.rank)
            served.pull()
            table(at).sum().backward()
            served.push()
        served.drain()
    return sum(moved for op, (_, moved) in group.wire.items() if op in ("send", "recv"))


def test_only_rows_that_are_used_travel() -> None:
    dense, sparse = (max(run_ranks(2, only_rows_travel, sparse)) for sparse in (False, True))
    assert dense > 3 * 20_000 * 16 * 4
    assert sparse < dense / 100


def bereft(rank: Rank, options: dict[str, Any], victim: int) -> tuple[float, str]:
    group = group_of(rank)
    element = torch.zeros(100)
    served = ParameterServer({"x": element}, group, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **options)
    began = time.monotonic()
    try:
        with served:
            for clock in range(10_000):
                if rank.rank == victim and clock == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                served.pull()
                element.grad = torch.ones(100)
                time.sleep(0.001)
                served.push()
    except CommError as error:
        return time.monotonic() - began, str(error)
    raise AssertionError("the dead rank answered")


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "stale", "bound": 2}, {"method": "async"}, {"backup": 1}],
    ids=["sync", "stale", "async", "b"],
)
def test_a_death_is_an_error_on_every_other_rank_within_seconds(options: dict[str, Any]) -> None:
    found = run_ranks(3, bereft, options, 1, may_die=(1,))
    for rank in (0, 2):
        seconds, text = found[rank]
        assert seconds < 5, text
        assert "rank 1" in text or "rank(s) 1" in text.lower()


def go_on(served: ParameterServer, element: Tensor) -> None:
    """For ever, or until an error."""
    with served:
        while True:
            served.pull()
            element.grad = torch.ones_like(element)
            served.push()


def server_dies(rank: Rank) -> str:
    group = group_of(rank)
    element = torch.zeros(100)
    served = ParameterServer(
        {"x": element},
        group,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        servers=(2,),
        workers=(0, 1),
        method="async",
    )
    if rank.rank == 2:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CommError) as caught:
        go_on(served, element)
    return str(caught.value)


def test_the_death_of_a_server_is_an_error_on_every_worker() -> None:
    found = run_ranks(3, server_dies, may_die=(2,))
    assert all(found[:2])


def stuck(rank: Rank) -> tuple[float, str]:
    group = group_of(rank, timeout_s=1.0)
    element = torch.zeros(4)
    served = ParameterServer(
        {"x": element}, group, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), method="stale", bound=1, servers=(0,)
    )
    served.pull()
    if rank.rank == 1:
        time.sleep(4)
        return 0.0, ""
    began = time.monotonic()
    served.push()
    with pytest.raises(CommError) as caught:
        go_on(served, element)
    return time.monotonic() - began, str(caught.value)


def test_waiting_for_a_slow_worker_has_a_limit_and_names_it() -> None:
    seconds, text = run_ranks(2, stuck)[0]
    assert 0.9 < seconds < 3.5
    assert "rank 0 waited 1 s to start clock 2, for rank(s) 1" in text


def bad_optimizer(rank: Rank) -> str:
    class Wrong(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise ZeroDivisionError("the user's own mistake")

    group = group_of(rank)
    element = torch.zeros(4)
    served = ParameterServer({"x": element}, group, optimizer=lambda p: Wrong(p, lr=1.0), method="stale", servers=(0,))
    with pytest.raises((CommError, ZeroDivisionError)) as caught:
        go_on(served, element)
    return str(caught.value)


def test_an_optimizer_that_fails_on_a_server_is_an_error_everywhere() -> None:
    texts = run_ranks(2, bad_optimizer)
    assert any("the user's own mistake" in text for text in texts)


def wrong_terms(rank: Rank) -> list[str]:
    group = group_of(rank)
    texts = []
    for options in (
        {"method": "async", "bound": 3},
        {"backup": 2},
        {"method": "stale", "backup": 1},
        {"servers": (0, 5)},
    ):
        with pytest.raises(SpecError) as caught:
            ParameterServer({"x": torch.zeros(3)}, group, optimizer=lambda p: torch.optim.SGD(p), **options)
        texts.append(str(caught.value))
    served = ParameterServer(
        {"x": torch.zeros(3)}, group, optimizer=lambda p: torch.optim.SGD(p), servers=(0,), workers=(1,)
    )
    if rank.rank == 0:
        with pytest.raises(SpecError, match="only a server"):
            served.pull()
        served.serve()
    else:
        with served, pytest.raises(SpecError, match="worker too"):
            served.serve()
    return texts


def test_terms_that_cannot_be_are_refused() -> None:
    for texts in run_ranks(2, wrong_terms):
        assert ["bound" in texts[0], "backup" in texts[1], "backup" in texts[2], "servers" in texts[3]] == [True] * 4


def dense_table(rank: Rank) -> None:
    group = group_of(rank)
    table = nn.Embedding(10, 2)
    with ParameterServer(
        {"table": table.weight}, group, optimizer=lambda p: torch.optim.SGD(p), tables=["table"], method="async"
    ) as served:
        served.pull()
        table(torch.tensor([1])).sum().backward()
        served.push()


def test_a_dense_gradient_of_a_table_is_refused() -> None:
    with pytest.raises(RankFailed, match="sparse=True"):
        run_ranks(2, dense_table)
