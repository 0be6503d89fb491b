"""A plain loop with `hivemind.Optimizer`, as in its quick start: local updates, averaged in the background."""

from __future__ import annotations

import os
import time
from pathlib import Path

import hivemind
import torch

from bench import work
from bench.line import serve
from bench.slow_case import SlowCase
from bench.slow_work import HeldOut, Ordered, set_rate

MATCHMAKING_S, AVERAGING_S = 3.0, 30.0  # its own advice: 3 to 5 s for small local runs; twice what an average takes
MEETING_LIMIT_S = 60.0


def meet(case: SlowCase, rank: int) -> hivemind.DHT:
    """Rank 0 is the first peer; its address, which has a new key in it each time, goes through a file."""
    place = Path(case.folder) / f"hivemind-{os.environ['MASTER_PORT']}-{os.environ['BENCH_LINK']}"
    if rank == 0:
        address = f"/ip4/{os.environ['MASTER_ADDR']}/tcp/{os.environ['MASTER_PORT']}"
        dht = hivemind.DHT(host_maddrs=[address], start=True)
        text = "\n".join(str(each) for each in dht.get_visible_maddrs())
        place.with_suffix(".new").write_text(text)
        place.with_suffix(".new").rename(place)
        return dht
    end = time.monotonic() + MEETING_LIMIT_S
    while not place.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"rank 0 has not written {place} within {MEETING_LIMIT_S:.0f} s")
        time.sleep(0.05)
    return hivemind.DHT(initial_peers=place.read_text().split(), host_maddrs=["/ip4/0.0.0.0/tcp/0"], start=True)


def main() -> None:
    case = SlowCase.from_environment()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dht = meet(case, rank)
    module = work.model(case)
    inner = work.optimizer(case, module.parameters())
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="slow_link",
        optimizer=inner,
        batch_size_per_step=case.batch,
        target_batch_size=case.settings["every"] * case.global_batch,
        use_local_updates=True,
        state_averaging_compression=hivemind.compression.Float16Compression(),
        matchmaking_time=MATCHMAKING_S,
        averaging_timeout=AVERAGING_S,
        averager_opts={"request_timeout": MATCHMAKING_S / 3},  # below the former, or it warns of deadlocks
    )
    batches, held_out = Ordered(case, rank), HeldOut(case)
    done = 0

    def step() -> float:
        nonlocal done
        batch = batches[done]
        set_rate(inner, case.rate(done))
        optimizer.zero_grad()
        loss = work.loss(module(batch["tokens"]), batch)
        loss.backward()
        optimizer.step()
        done += 1
        return loss.item()

    serve(
        step,
        rank=rank,
        world=world,
        checksum=lambda: work.checksum(module),
        evaluate=lambda: held_out.loss(module),
        tell=lambda: {"epochs": optimizer.local_epoch},
    )
    optimizer.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
