"""What a step costs without synchronisation: each rank trains alone, and nothing is sent.

The leanest loop that trains: the model, optimizer, precision and samples of the other systems, no framework and no
process group, a rank's samples read with one slice. Memory is given back as glibc does it by default, as in the peers'
loops; shardwise has it kept. With `--barrier` the ranks also meet at the end of each step, which is the least that any
synchronisation of every step must do: nobody begins before the last one is there.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path

import numpy as np
import torch

from bench import work
from bench.case import Case
from bench.line import serve

LIMIT_S = 60.0


class Barrier:
    """One byte to every other rank of this host and one from each, through named pipes in `folder`.

    Stricter than `dist.barrier()`, which is what a user of torch would call: between two ranks that arrive together
    that took 200 us and more over gloo, this 10 us. A loop that watches shared memory takes one, but keeps a core busy
    that the last rank may need; here who waits sleeps until the kernel wakes it, and the last one does not wait at all.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        others = [other for other in range(world) if other != rank]
        self._to = [_pipe(folder / f"barrier-{rank}-{other}") for other in others]
        self._from = [_pipe(folder / f"barrier-{other}-{rank}") for other in others]

    def meet(self) -> None:
        """Return once every rank has called this as often. Raises TimeoutError after LIMIT_S without a byte."""
        for pipe in self._to:
            os.write(pipe, b".")
        for pipe in self._from:
            if not select.select([pipe], [], [], LIMIT_S)[0]:
                raise TimeoutError(f"another rank did not come to the barrier within {LIMIT_S:.0f} s.")
            os.read(pipe, 1)


def _pipe(path: Path) -> int:
    """Either end may come first. Open for both directions, so that opening does not wait for the other end."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path)
    return os.open(path, os.O_RDWR)


def main() -> None:
    case = Case.from_environment()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if case.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    model = work.model(case).to(device)
    optimizer = work.optimizer(case, model.parameters())
    rows = work.ordered_tokens(case).rows
    barrier = Barrier(Path(case.folder), rank, world) if "--barrier" in sys.argv else None
    at = rank * case.batch

    def step() -> float:
        nonlocal at
        samples = torch.from_numpy(rows[at : at + case.batch].astype(np.int64))
        at += case.global_batch
        batch = work.on_device({"tokens": samples[:, :-1], "targets": samples[:, 1:]}, device)
        optimizer.zero_grad()
        with work.autocast(case):
            loss = work.loss(model(batch["tokens"]), batch)
        loss.backward()
        optimizer.step()
        value = loss.item()
        if barrier is not None:
            barrier.meet()
        return value

    serve(step, rank=rank, world=world, checksum=lambda: work.checksum(model))


if __name__ == "__main__":
    main()
