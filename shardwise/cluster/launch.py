"""Where ranks run, by name: as processes of this host, in an environment that already has them, or nowhere (tests)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shardwise.cluster.env import EnvLauncher
from shardwise.cluster.fake import FakeLauncher
from shardwise.cluster.local import LocalLauncher
from shardwise.cluster.ranks import RankExits


class Launcher(Protocol):
    """Runs all ranks of a plan, or those that are this process's to run."""

    def run(
        self,
        entry: str,
        args_of_rank: Callable[[int], Mapping[str, Any]],
        ranks: int,
        *,
        logs: Path,
        on_poll: Callable[[], None] = ...,
        grace_s: float = ...,
    ) -> RankExits:
        """Call `entry` ("package.module:function") in every rank, and return their ends when all have ended.

        A rank is called as `entry(rank=, world=, port=, listen_fd=, **args_of_rank(rank))`. Raises ClusterError.
        """
        ...

    def close(self) -> None:
        """End whatever still runs and release it. May be called twice."""
        ...


# Construct a launcher as early as you can: the local one begins to import torch in its zygote at once.
LAUNCHERS: dict[str, Callable[..., Launcher]] = {
    "local": LocalLauncher.start,
    "env": EnvLauncher,
    "fake": FakeLauncher,
}
