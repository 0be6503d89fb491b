"""From the plan's word of synchronisation to what does it."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.comm.mesh import Axis
from shardwise.parallel.local import LocalUpdates
from shardwise.parallel.reducer import Named
from shardwise.parallel.synchronise import Synchroniser
from shardwise.spec.sync import Sync


def synchroniser(named: Callable[[], Named], axis: Axis, sync: Sync, *, shards: int | None) -> Synchroniser:
    """How this replica agrees with the others. With one rank there is nobody to agree with, whatever the word."""
    if axis.group is None:
        return Synchroniser(named, axis, sync, shards=shards)
    if sync.word == "local":
        return LocalUpdates(named, axis, sync)
    return Synchroniser(named, axis, sync, shards=shards)
