"""Ranks as threads of one process, and a small model with everything in it that a checkpoint has to keep."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.checkpoint.save import Saved, save
from shardwise.checkpoint.store import Store
from shardwise.spec.plan import Plan

Barrier = Callable[[], None]


def on_ranks(world: int, work: Callable[[int, Barrier], Any]) -> list[Any]:
    """`work(rank, barrier)` on `world` threads; what each returned, or the exception that it raised."""
    meeting = threading.Barrier(world)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, lambda: void(meeting.wait(timeout=20)))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def save_on(world: int, store: Store, **settings: Any) -> list[Saved | BaseException]:
    """`save` of the same tensors on all ranks of `data=world`, or of the given `plan`."""
    given: dict[str, Any] = {"step": 1, "tensors": {"model/w": torch.arange(6.0)}, "scalars": {}, **settings}
    plan = given.pop("plan", Plan(data=world))
    return on_ranks(
        world, lambda rank, barrier: save(store, plan=plan, rank=rank, world=world, barrier=barrier, **given)
    )


def save_alone(store: Store, **settings: Any) -> Saved:
    """`save` on one rank; raises what it raises."""
    (result,) = save_on(1, store, **settings)
    if isinstance(result, BaseException):
        raise result
    return result


class Net(nn.Module):
    """Tied, frozen, empty, 0-dim, strided and bfloat16 parameters; buffers kept and not kept."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.strided = nn.Parameter(torch.empty(5, 6).t())
        self.brief = nn.Parameter(torch.empty(6, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.empty(3), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embed(tokens)) * self.scale + self.brief.float() + (self.strided.sum(1))
        return self.head(x) + self.nothing.sum()


def optimizers_of(net: Net) -> list[torch.optim.Optimizer]:
    """AdamW for the matrices in two groups, momentum for all else."""
    matrices = [p for p in net.body.parameters() if p.dim() == 2]
    taken = {id(p) for p in matrices} | {id(net.embed.weight)}
    rest = [p for p in net.parameters() if id(p) not in taken]
    groups = [{"params": matrices, "lr": 0.01}, {"params": [net.embed.weight], "betas": (0.8, 0.9)}]
    return [torch.optim.AdamW(groups, weight_decay=0.1), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]


def trained(seed: int = 0, steps: int = 2) -> tuple[Net, list[torch.optim.Optimizer]]:
    """A net and its optimizers after a few steps."""
    net = Net(seed)
    optimizers = optimizers_of(net)
    train(net, optimizers, steps)
    return net, optimizers


def train(net: Net, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    tokens = torch.arange(22).remainder(11)
    for _ in range(steps):
        nn.functional.cross_entropy(net(tokens), (tokens + 1).remainder(11)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def raw(tensor: Tensor) -> bytes:
    """The tensor's bits, in logical order."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Tensors as values that compare bit by bit."""
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in tensors.items()}


def void(_: object) -> None:
    return None
