"""From the plan's word of synchronisation to what does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardwise.comm.mesh import Mesh
from shardwise.parallel.auto import AutoSync
from shardwise.parallel.local import LocalUpdates
from shardwise.parallel.reducer import Named
from shardwise.parallel.synchronise import Synchroniser
from shardwise.spec.sync import Sync


def synchroniser(
    named: Callable[[], Named], mesh: Mesh, sync: Sync, *, shards: int | None = None, allow: Sequence[str] = ()
) -> Synchroniser:
    """How this replica agrees with the others. With one rank there is nobody to agree with, whatever the word."""
    axis = mesh.axis("data")
    if axis.group is None:
        return Synchroniser(named, axis, sync, shards=shards)
    if sync.word == "auto":
        return AutoSync(named, mesh, sync, allow=allow, make=lambda chosen: synchroniser(named, mesh, chosen))
    if sync.word == "local":
        return LocalUpdates(named, axis, sync)
    return Synchroniser(named, axis, sync, shards=shards)
