"""One rank of `bench.multipath`: all systems in one process, in turns. Rank 0 prints the seconds as JSON.

`multipath ADDRESS PORT SYSTEMS BYTES ROUNDS RANK`; rank 0 serves the store at ADDRESS.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from shardwise.comm.group import GroupSettings, register
from shardwise.comm.store import environment_store

BOTH, FASTER = "link0,link1", "link0"
WARM_UP = 3  # rounds: connections find their windows, and we our weights


def group_of(name: str) -> Any:
    """A group of both ranks over the links that the system is to use."""
    links = BOTH if name in ("shardwise", "gloo:two") else FASTER
    ours = name.startswith("shardwise")
    os.environ["GLOO_SOCKET_IFNAME" if not ours else "SHARDWISE_INTERFACES"] = links
    try:
        if ours:
            return dist.new_group(backend="shardwise", pg_options=GroupSettings(host=None))
        return dist.new_group(backend="gloo")
    finally:
        os.environ.pop("SHARDWISE_INTERFACES", None)


def main(address: str, port: str, systems: str, nbytes: str, rounds: str, number: str) -> None:
    torch.set_num_threads(1)
    rank = int(number)
    register()
    os.environ["GLOO_SOCKET_IFNAME"] = FASTER
    store = environment_store(rank, 2, address, int(port), 60, agent_store=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    groups = {name: group_of(name) for name in systems.split(",")}
    found: dict[str, list[float]] = {name: [] for name in groups}
    for turn in range(int(rounds) + WARM_UP):
        for name, group in groups.items():
            bucket = torch.full((int(nbytes) // 4,), float(rank + 1))
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(bucket, group=group)
            if turn >= WARM_UP:
                found[name].append(time.perf_counter() - began)
            if not bool((bucket == 3.0).all()):
                raise SystemExit(f"{name}: the sum is wrong")
    dist.barrier()
    if rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
