"""Ranks under torchrun that time a collective on request, over the transport that the environment names."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench.timed import Made, serve

all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name warns
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def main() -> None:
    transport = os.environ["BENCH_TRANSPORT"]
    torch.set_num_threads(1)
    if transport in ("gloo", "limit"):
        dist.init_process_group("gloo")
    else:
        from shardwise.comm.group import register

        register()
        os.environ["SHARDWISE_TRANSPORT"] = "shm"
        dist.init_process_group("shardwise")
    serve(dist.get_rank(), dist.get_world_size(), lambda operation, nbytes: make(transport, operation, nbytes))
    dist.destroy_process_group()


def make(transport: str, operation: str, nbytes: int) -> Made:
    """The call to time, what sets its tensors up, and whether they hold the right result."""
    count, rank, world = max(1, nbytes // 4), dist.get_rank(), dist.get_world_size()
    if operation != "all_reduce":
        return other(operation, count, rank, world, kernel=transport == "kernel")
    tensor = zeros(transport, count)
    call: Callable[[], Any]
    if transport == "limit":
        call = lambda: tensor.add_(1.0)  # noqa: E731
        return Made(call, lambda: tensor.fill_(1.0), lambda: True)
    call = lambda: dist.all_reduce(tensor)  # noqa: E731
    if transport == "kernel":
        call = kernel_call(operation, tensor, tensor, tensor)
    total = float(world * (world + 1) // 2)
    return Made(call, lambda: tensor.fill_(rank + 1.0), lambda: bool((tensor == total).all()))


def zeros(transport: str, count: int) -> torch.Tensor:
    if transport == "shared":
        return dist.group.WORLD.zeros(count, torch.float32, torch.device("cpu"))  # type: ignore[union-attr]
    return torch.zeros(count)


def kernel_call(operation: str, whole: torch.Tensor, mine: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
    """The calls into the compiled kernel that an operation takes, with nothing of torch around them."""
    from shardwise.comm.kernel import Kind, Outcome, kernel

    context = dist.group.WORLD._inners["cpu"].backend.context  # type: ignore[union-attr]
    post, end, message, wait, release = (
        getattr(kernel(), f"shm_{name}") for name in ("post", "end", "message", "wait", "release")
    )
    rank = dist.get_rank()
    source, target, piece = {
        "all_gather": (mine, whole, mine),
        "gather": (mine, whole, mine),
        "reduce_scatter": (whole, mine, mine),
        "scatter": (whole, mine, mine),
        "all_to_all": (whole, out, mine),
    }.get(operation, (whole, whole, whole))
    begin, target_at, nbytes = source.data_ptr(), target.data_ptr(), piece.nbytes
    if operation == "send_recv":
        if rank >= dist.get_world_size() // 2 * 2:
            return lambda: None
        kind = Kind.RECV if rank % 2 else Kind.SEND

        def pass_on() -> None:
            handle = message(context, kind, rank ^ 1, 0, begin, nbytes)
            while wait(context, handle, 1.0) == Outcome.AGAIN:
                continue
            release(context, handle)

        return pass_on
    what = int(Kind[operation.upper()])

    def call() -> None:
        if end(context, handle := post(context, what, begin, target_at, nbytes), 60.0) != Outcome.OK:
            release(context, handle)
            raise RuntimeError(f"{operation} did not end")

    return call


def other(operation: str, count: int, rank: int, world: int, *, kernel: bool) -> Made:
    """The operations beside all-reduce, on one whole tensor of `count` elements."""
    piece = max(1, count // world)
    whole, mine = torch.zeros(piece * world), torch.zeros(piece)
    parts = list(whole.split(piece))
    peer = rank ^ 1

    def fill() -> None:
        whole.fill_(rank + 1.0)
        mine.fill_(rank + 1.0)

    def send_recv() -> None:
        if rank >= world - world % 2:
            return
        dist.send(whole, peer) if rank % 2 == 0 else dist.recv(whole, peer)

    calls: dict[str, Callable[[], Any]] = {
        "reduce": lambda: dist.reduce(whole, 0),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all_gather": lambda: all_gather(whole, mine),
        "reduce_scatter": lambda: reduce_scatter(mine, whole),
        "gather": lambda: dist.gather(mine, parts if rank == 0 else None),
        "scatter": lambda: dist.scatter(mine, parts if rank == 0 else None),
        "all_to_all": lambda: dist.all_to_all_single(out, whole),
        "send_recv": send_recv,
        "barrier": dist.barrier,
    }
    out = torch.zeros_like(whole)
    ranks = torch.arange(1.0, world + 1).repeat_interleave(piece)
    total = float(world * (world + 1) // 2)
    rights: dict[str, Callable[[], bool]] = {
        "reduce": lambda: rank != 0 or bool((whole == total).all()),
        "broadcast": lambda: bool((whole == 1).all()),
        "all_gather": lambda: torch.equal(whole, ranks),
        "reduce_scatter": lambda: bool((mine == total).all()),
        "gather": lambda: rank != 0 or torch.equal(whole, ranks),
        "scatter": lambda: bool((mine == 1).all()),
        "all_to_all": lambda: torch.equal(out, ranks),
        "send_recv": lambda: bool((whole == rank - rank % 2 + 1).all()) or rank >= world - world % 2,
        "barrier": lambda: True,
    }
    call = kernel_call(operation, whole, mine, out) if kernel else calls[operation]
    return Made(call, fill, rights[operation])


if __name__ == "__main__":
    main()
