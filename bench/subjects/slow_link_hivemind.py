"""A plain loop with `hivemind.Optimizer`, as in its quick start: local updates, averaged with whoever is there.

A peer that has enough samples waits, inside a step, for the others to find that too. One that stood still after its
part of a turn would leave it there until its time-out, so a rank that has done its steps goes on until both have.
"""

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


def meeting(case: SlowCase) -> Path:
    return Path(case.folder) / f"hivemind-{os.environ['MASTER_PORT']}-{os.environ['BENCH_LINK']}"


def meet(case: SlowCase, rank: int) -> hivemind.DHT:
    """Rank 0 is the first peer; its address, which has a new key in it each time, goes through a file."""
    place = meeting(case)
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
        allreduce_timeout=AVERAGING_S,
        averager_opts={"request_timeout": MATCHMAKING_S / 3},  # below the former, or it warns of deadlocks
    )
    own, other = (meeting(case).with_suffix(f".{each}") for each in (rank, 1 - rank))
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

    def together(steps: int) -> bool:
        """Say that this rank has done so many steps; whether the other has."""
        own.touch()
        os.truncate(own, steps)  # its length is the number, which the other never sees half written
        return other.exists() and other.stat().st_size >= steps

    serve(
        step,
        rank=rank,
        world=world,
        checksum=lambda: work.checksum(module),
        evaluate=lambda: held_out.loss(module),
        tell=lambda: {"epochs": optimizer.local_epoch},
        together=together,
    )
    optimizer.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
