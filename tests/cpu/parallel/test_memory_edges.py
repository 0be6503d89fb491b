"""What keeps less in memory, at its edges: schedulers, groups, views, changes in place, chance, files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.parallel.activations import Offloaded
from shardwise.parallel.recompute import Recomputed
from shardwise.parallel.spill import MOST_IDLE, Spill
from shardwise.parallel.updates import PiecewiseUpdates
from shardwise.spec.plan import Offload, Plan, Recompute

DISK = Plan(offload=Offload(optimizer="disk"))


def matrices(count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(128, 128) for _ in range(count)))
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    return module


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan | None, folder: Path) -> Tensor:
    if plan is None:
        optimizer.step()
    else:
        updates = PiecewiseUpdates(module, list(module.named_parameters()), plan, folder)
        updates.step([optimizer])
        updates.close()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("plan", [DISK, Plan(states="bfloat16")], ids=str)
def test_an_optimizer_with_a_scheduler_steps_once(plan: Plan, tmp_path: Path) -> None:
    found, calls = [], [0]
    for chosen in (None, plan):
        module = matrices()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        torch.optim.lr_scheduler.StepLR(optimizer, 3)
        optimizer.register_step_post_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        found.append(stepped(module, optimizer, chosen, tmp_path))
    assert torch.equal(*found)
    assert calls == [2]


class Trusting(torch.optim.Optimizer):
    """Looks at the whole of a parameter where it decays."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    ratio = p.norm() / p.grad.norm() if group["weight_decay"] else 1.0
                    p.add_(p.grad * ratio, alpha=-group["lr"])


class Assigning(Trusting):
    """Gives a parameter another tensor."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


@pytest.mark.parametrize("kind", [Trusting, Assigning])
def test_every_group_is_tried_and_every_way_to_write(kind: Any, tmp_path: Path) -> None:
    found = []
    for plan in (None, DISK):
        module = matrices()
        flat, deep = ([p for p in module.parameters() if p.dim() == dims] for dims in (1, 2))
        groups = [{"params": flat}, {"params": deep, "weight_decay": 0.01}]
        found.append(stepped(module, kind(groups), plan, tmp_path))
    assert torch.equal(*found)


def test_a_parameter_that_is_a_view_with_gaps_is_refused(tmp_path: Path) -> None:
    module = matrices(1)
    module[0].weight = nn.Parameter(torch.randn(128, 256)[:, :128])  # type: ignore[index,union-attr]
    with pytest.raises(JobError, match=r"'0.weight' is a view of a larger tensor"):
        PiecewiseUpdates(module, list(module.named_parameters()), DISK, tmp_path)
    turned = nn.Parameter(torch.randn(128, 128).T)  # dense, in another order
    module[0].weight = turned  # type: ignore[index,union-attr]
    PiecewiseUpdates(module, list(module.named_parameters()), DISK, tmp_path).close()


def test_states_of_many_parameters_are_shown_with_few_files_open(tmp_path: Path) -> None:
    module = matrices(200)
    optimizer = torch.optim.AdamW(module.parameters())
    updates = PiecewiseUpdates(module, list(module.named_parameters()), DISK, tmp_path)
    updates.step([optimizer])
    before = len(list(Path("/proc/self/fd").iterdir()))
    with updates.shown([optimizer]):
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
        assert len(optimizer.state) == 400
    updates.close()


def test_what_changed_in_place_is_an_error_as_without_offload(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    away = Offloaded(layer, "disk", torch.device("cpu"), tmp_path)
    with away.around():
        grown = layer(torch.randn(4, 8)).exp()
        total = (grown * 2).sum()
        grown.add_(5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    away.close()


def test_a_small_view_leaves_without_the_rest(tmp_path: Path) -> None:
    away = Offloaded(nn.Linear(1, 1), "disk", torch.device("cpu"), tmp_path)
    large = torch.randn(1000, 4096)
    weight = torch.randn(4096, requires_grad=True)
    with away.around():
        total = (large[:20] * weight).sum()
    total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, large[:20].sum(0))
    assert away._spill is not None
    assert away._spill.buffered <= 2 * 2**20
    away.close()


def test_memory_of_sizes_out_of_use_is_given_back(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    for megabytes in range(1, 40):
        spill.recycle(spill.buffer(torch.uint8, megabytes * 2**20))
    assert spill.buffered <= MOST_IDLE + 2 * 40 * 2**20
    again = spill.buffer(torch.uint8, 39 * 2**20)
    assert spill.buffered <= MOST_IDLE + 2 * 40 * 2**20
    spill.recycle(again)
    spill.close()
    spill.close()


class Chancy(nn.Module):
    """Its forward does what `kind` says."""

    mean: Tensor | None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.calls = nn.Linear(8, 8), kind, 0
        self.register_buffer("mean", None if kind == "lazy" else torch.zeros(8))

    def forward(self, x: Tensor, *, early_stop: bool = True, debug: float = 1.0) -> Tensor:
        self.calls += 1
        out: Tensor = self.layer(x) * debug * (1.0 if early_stop else 2.0)
        if self.kind == "chance":
            out = out * float(np.random.uniform()) * random.random()
        if self.kind == "lazy" or (self.kind == "late" and self.calls > 1):
            self.mean = out.detach().mean(0)
        return (out - self.mean).tanh() if self.mean is not None else out


class Chain(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Chancy(kind) for _ in range(3))
        self.more = {"early_stop": False, "debug": 0.5} if kind == "keywords" else {}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **self.more)
        return x


def slopes(kind: str, *, again: bool) -> list[Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    module = Chain(kind)
    recomputed = Recomputed(module, Plan(recompute=Recompute(mode="full"))) if again else None
    for _ in range(3):
        module(torch.ones(4, 8)).square().sum().backward()
    if recomputed is not None:
        recomputed.close()
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["chance", "keywords"])
def test_recomputed_blocks_have_the_same_chance_and_keywords(kind: str) -> None:
    for once, twice in zip(slopes(kind, again=False), slopes(kind, again=True), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize(("kind", "said"), [("lazy", "makes its buffer 'mean'"), ("late", "changed in a later one")])
def test_buffers_that_recompute_cannot_follow_are_an_error(kind: str, said: str) -> None:
    with pytest.raises(JobError, match=said):
        slopes(kind, again=True)
