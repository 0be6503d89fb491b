"""Two ranks under torchrun that train a small GPT over bytes by a method of `compressed`, or time what it computes."""

from __future__ import annotations

import os
import random
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.line import Message, connect
from shardwise.comm.coded import Coded
from shardwise.comm.compressed import CompressedSum, Method
from shardwise.comm.exchange import Bucketed, Piece
from shardwise.comm.fake import fake_group
from shardwise.comm.group import Group, register
from shardwise.comm.mesh import Axis
from shardwise.comm.methods import make_codec
from shardwise.comm.powersgd import PowerSGD
from shardwise.models.gpt import GPT
from shardwise.parallel.reducer import Reducer

CONTEXT, BATCH, WARMUP = 128, 4, 30
ADAM_LR, SGD_LR = 3e-3, 0.05
TEXT_BYTES, HELD_OUT_BYTES, HELD_OUT_BATCHES = 4 << 20, 1 << 19, 16
ROWS, COLUMNS, ALONE = 1024, 4096, 15


def main() -> None:
    torch.set_num_threads(1)
    register()
    dist.init_process_group("shardwise")
    group = dist.group.WORLD
    assert isinstance(group, Group)
    train, held_out = texts()
    line = connect()
    line.send({"rank": group.rank(), "world": group.size(), "pid": os.getpid()})
    while (command := line.receive()) is not None and command["do"] in ("train", "time"):
        if command["do"] == "train":
            line.send(run(group, train, held_out, command))
        else:  # by one rank, with the machine to itself
            line.send(time_alone(command) if group.rank() == 0 else {"before": 0.0, "after": 0.0})
    line.close()
    dist.destroy_process_group()


def texts() -> tuple[Tensor, Tensor]:
    """Bytes of Python's standard library to train on, and of other files of it to look at afterwards."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    whole = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()
    return whole[HELD_OUT_BYTES:][:TEXT_BYTES], whole[:HELD_OUT_BYTES]


def windows(text: Tensor, generator: torch.Generator) -> Tensor:
    """[batch, context + 1] at random places."""
    starts = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])


def loss_of(net: nn.Module, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def optimizer_of(net: nn.Module, name: str) -> tuple[float, torch.optim.Optimizer]:
    """The learning rate after the warm-up, and the optimizer; both rates are near the best for an all-reduce."""
    if name == "sgd":
        return SGD_LR, torch.optim.SGD(net.parameters(), lr=SGD_LR, momentum=0.9)
    return ADAM_LR, torch.optim.AdamW(net.parameters(), lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.1)


def run(group: Group, train: Tensor, held_out: Tensor, command: Message) -> Message:
    """Train as the command says; the held-out loss, and the bytes that the last step sent for a parameter."""
    torch.manual_seed(command["seed"])
    net = GPT(layers=3, width=128, heads=4, vocab=256, context=CONTEXT)
    exchange = None if command["method"] == "all_reduce" else sums(group, command)
    axis = Axis("data", group.rank(), group.size(), group)
    reducer = Reducer(lambda: list(net.named_parameters()), axis, bucket_bytes=1 << 20, exchange=exchange)
    rate, optimizer = optimizer_of(net, command["optimizer"])
    generator = torch.Generator().manual_seed(1000 * command["seed"] + group.rank())
    for step in range(command["steps"]):
        for each in optimizer.param_groups:
            each["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        before = dict(group.wire)
        loss_of(net, windows(train, generator)).backward()
        reducer.finish(mean=True)
        optimizer.step()
        reducer.clear()
    sent = sum(total - before.get(op, (0, 0))[1] for op, (_, total) in group.wire.items())
    reducer.close()
    looks = torch.Generator().manual_seed(7)
    with torch.no_grad():
        losses = [float(loss_of(net, windows(held_out, looks))) for _ in range(HELD_OUT_BATCHES)]
    size = sum(p.numel() for p in net.parameters())
    return {"loss": statistics.mean(losses), "bytes": sent / size}


def sums(group: Group, command: Message) -> CompressedSum:
    """What sums the gradients as the command says."""
    numbers = command["numbers"]
    if command["method"] == "powersgd":
        method: Method = PowerSGD(group, numbers["rank"])
    else:
        method = Coded(group, make_codec(command["method"], **numbers))
    return CompressedSum(group, method, feedback=command["feedback"], start=command["start"])


def time_alone(command: Message) -> Message:
    """Milliseconds that one MB of gradients costs a rank beside the wire: before it is sent, and once it has come."""
    group = fake_group(2)
    exchange = sums(group, command)
    body = torch.empty(ROWS * COLUMNS)
    exchange.arrange([Bucketed(body.numel(), body.dtype, body.device, (Piece("matrix", 0, (ROWS, COLUMNS)),))])
    gradients = torch.randn(body.numel())
    before, after = [], []
    for _ in range(ALONE):
        body.copy_(gradients)
        began = time.perf_counter()
        pending = exchange.start(0, body, body, body[:0], mean=True)
        sent = time.perf_counter()
        pending.wait()
        before.append(sent - began)
        after.append(time.perf_counter() - sent)
    megabytes = body.nbytes / 1e6
    return {"before": 1e3 * statistics.median(before) / megabytes, "after": 1e3 * statistics.median(after) / megabytes}


if __name__ == "__main__":
    main()
