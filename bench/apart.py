"""One rank at each end of a wire, or all ranks in one session: `python -m bench.apart JSON` starts them, and ends all
when one fails. No torch.

The JSON has `prefixes`, what goes before the command of each rank, and `command`. A rank finds its place in the
environment, as torchrun would set it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.netns import DEVICE, ENDS, Link


def command(link: Link, cores: Sequence[int], module: str) -> list[str]:
    """What starts the ranks `python -m module`, each pinned to a core."""
    prefixes = [link.inside(end, cores[end % len(cores)]) for end in range(len(ENDS))]
    said = json.dumps({"prefixes": prefixes, "command": [sys.executable, "-m", module]})
    # Inside too, although nothing is sent from here: the link's janitor ends what is inside, even if it was stopped.
    return [*link.inside(0), sys.executable, "-m", "bench.apart", said]


def environment(link: Link, port: int) -> dict[str, str]:
    """What is alike for both ranks; they meet at `port` of the first one's address."""
    found = {"MASTER_ADDR": ENDS[0], "MASTER_PORT": str(port), "WORLD_SIZE": str(len(ENDS))}
    return found | {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "BENCH_LINK": link.names[0],
        "GLOO_SOCKET_IFNAME": DEVICE,
    }


def main(said: str) -> int:
    """The first status that is not 0."""
    asked = json.loads(said)
    ranks = [
        subprocess.Popen([*prefix, *asked["command"]], env={"LOCAL_RANK": str(rank)} | os.environ | {"RANK": str(rank)})
        for rank, prefix in enumerate(asked["prefixes"])
    ]
    while (left := [each for each in ranks if each.poll() is None]) and not any(each.returncode for each in ranks):
        time.sleep(0.1)
    for each in left:
        each.terminate()
    for each in ranks:
        each.wait()
    return next((each.returncode for each in ranks if each.returncode), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
