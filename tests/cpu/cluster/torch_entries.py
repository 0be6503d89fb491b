"""What the ranks of these tests run where torch is needed. Imported in the zygote too, so it starts no thread."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def threads(folder: str) -> None:
    """How many threads torch uses, and that a parallel region in a forked process works."""
    product = torch.ones(256, 256) @ torch.ones(256, 256)
    Path(folder, "threads").write_text(json.dumps([torch.get_num_threads(), float(product.sum())]))


def meet(rank: int, world: int, port: int, listen_fd: int | None, folder: str) -> None:
    """Sum over gloo, then stay until all have been looked at."""
    limit = timedelta(seconds=30)
    store = dist.TCPStore(
        "127.0.0.1", port, world, is_master=listen_fd is not None, timeout=limit, master_listen_fd=listen_fd
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    Path(folder, f"met-{os.getpid()}").write_text(str(total.item()))
    while not Path(folder, "seen").exists():
        time.sleep(0.01)
    dist.destroy_process_group()
