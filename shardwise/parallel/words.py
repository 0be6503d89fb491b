"""From the plan's word of synchronisation to what does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardwise.comm.codec import Codec
from shardwise.comm.delayed import Delayed
from shardwise.comm.exchange import Exchange
from shardwise.comm.mesh import Mesh
from shardwise.comm.methods import make_codec, make_sum
from shardwise.parallel.auto import AutoSync
from shardwise.parallel.local import LocalUpdates
from shardwise.parallel.reducer import Named
from shardwise.parallel.served import ClockedUpdates, ServedUpdates
from shardwise.parallel.sharded import ShardedUpdates
from shardwise.parallel.synchronise import Synchroniser
from shardwise.parallel.units import Units
from shardwise.spec.sync import Sync

CODECS = {16: "bf16", 8: "int8", 4: "int4", 2: "int2"}


def synchroniser(
    named: Callable[[], Named],
    mesh: Mesh,
    sync: Sync,
    *,
    shards: int | None = None,
    allow: Sequence[str] = (),
    tables: Sequence[str] = (),
    units: Units | None = None,
) -> Synchroniser:
    """How this replica agrees with the others. With one rank there is nobody to agree with, whatever the word.

    `tables` are the parameters with sparse gradients, `units` what is whole only while it computes.
    """
    if mesh.plan.shard > 1:
        return ShardedUpdates(named, mesh, units)
    axis = mesh.axis("batch")
    if axis.group is None:
        return Synchroniser(named, axis, sync, shards=shards)
    if sync.word == "auto":
        return AutoSync(named, mesh, sync, allow=allow, make=lambda chosen: synchroniser(named, mesh, chosen))
    if sync.word == "local":
        return LocalUpdates(named, axis, sync, _codec(sync))
    if sync.word == "param_server":
        if sync.method == "sync" and not sync.backup and not tables:
            return ServedUpdates(named, axis, sync, axis.group)
        second = mesh.second_group("batch", "parameter server")
        assert second is not None
        return ClockedUpdates(named, axis, sync, second, tables=tables)
    return Synchroniser(named, axis, sync, shards=shards, exchange=_exchange(mesh, sync))


def _codec(sync: Sync) -> Codec | None:
    """What local updates go through on the wire."""
    if sync.method == "sparse":
        return make_codec("topk", density=sync.density)
    return make_codec(CODECS[sync.bits]) if sync.bits in CODECS else None


def _exchange(mesh: Mesh, sync: Sync) -> Exchange | None:
    if sync.word != "compressed":
        return None
    if not sync.overlap:
        group = mesh.axis("batch").group
        assert group is not None
        return make_sum(group, sync)
    second = mesh.second_group("batch")  # its thread's operations are in no order with the others
    assert second is not None
    return Delayed(make_sum(second, sync), start=sync.start)
