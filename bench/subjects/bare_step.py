"""No framework at all: import torch, fork the ranks, one step with a gloo all-reduce of the gradients.

With `--preloaded` it knows a trick: the first optimizer that a process makes has torch import its compiler, a second
or more, so one is made before the fork.
"""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist

from bench import work
from bench.case import Case
from bench.stamp import stamp


def rank(case: Case, number: int, port: int) -> None:
    """One step on this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=case.ranks)
    model = work.model(case)
    optimizer = work.optimizer(case, model.parameters())
    rows = work.ordered_tokens(case)
    mine = [rows[number * case.batch + i] for i in range(case.batch)]
    batch = {name: torch.stack([row[name] for row in mine]) for name in ("tokens", "targets")}
    loss = work.loss(model(batch["tokens"]), batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= case.ranks
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    optimizer.step()
    loss.item()
    stamp(number)
    dist.destroy_process_group()


def main() -> None:
    case = Case.from_environment()
    if "--preloaded" in sys.argv:
        torch.optim.SGD([torch.zeros(1)])
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    children = []
    for number in range(case.ranks):
        child = os.fork()
        if child == 0:
            rank(case, number, port)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(1 if any(statuses) else 0)


if __name__ == "__main__":
    main()
