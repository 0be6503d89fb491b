"""Save: every rank writes its share into a pending folder, then rank 0 makes the manifest and renames the folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from msgspec import Struct

from shardwise import events
from shardwise.checkpoint.manifest import (
    MANIFEST,
    VERSION,
    DamagedCheckpoint,
    Entry,
    FileFacts,
    Manifest,
    Piece,
    RankRecord,
    committed,
    encode,
    file_name,
    folder_name,
    key_of,
    read,
    record_name,
    sizes_agree,
    step_of,
)
from shardwise.checkpoint.scalars import pack
from shardwise.checkpoint.store import Chunk, Store, is_pending, pending
from shardwise.checkpoint.tensorfile import dtype_name, local_part, stream
from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.spec.layout import Box, Shape, boxes, covers, local_offsets, local_shape, written_by
from shardwise.spec.plan import Plan


class Saved(Struct, frozen=True):
    """A checkpoint that is on disk. `bytes` counts all ranks' tensor files; it is 0 on ranks other than 0."""

    folder: str
    path: str
    seconds: float
    bytes: int


def save(
    store: Store,
    *,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Any],
    plan: Plan,
    rank: int,
    world: int,
    barrier: Callable[[], None],
    keep_last: int = 2,
    best: bool = False,
    shapes: Mapping[str, Shape] | None = None,
) -> Saved:
    """Save the state after `step` finished steps; all ranks call it together and pass three barriers, come what may.

    `tensors` are this rank's local tensors by their global names, laid out as `plan` says; of a cut tensor that is no
    DTensor `shapes` gives the global shape. `scalars` (plain data) are taken from rank 0. Replicas share the writing.
    The checkpoint appears under its final name complete and on disk, or not at all. Then rank 0 emits
    `checkpoint_saved` and deletes older checkpoints but the last `keep_last` whole ones (at least this one) and the
    newest that was saved with `best`.

    Raises CheckpointError on every rank when any could not write its share: the pending folder is removed, earlier
    checkpoints are untouched and training may go on. What `barrier` raises passes through.
    """
    assert world == plan.ranks, f"{world} ranks run a plan of {plan.ranks}"
    attempt = _Attempt(store, step, plan, rank)
    started = time.perf_counter()
    try:
        failures = [attempt.guarded(lambda: attempt.prepare(scalars, best))]
        barrier()
        failures += [attempt.guarded(lambda: attempt.write(tensors, shapes or {}))] if not failures[0] else []
        attempt.record(next(filter(None, failures), None))
        barrier()
        failures += [attempt.guarded(attempt.commit)] if rank == 0 else []
        barrier()
    except BaseException:
        attempt.abandon()
        raise
    failure = next(filter(None, failures), None) or attempt.guarded(attempt.confirm)
    if failure:
        attempt.abandon()
        raise failure
    saved = Saved(attempt.final, store.where(attempt.final), time.perf_counter() - started, attempt.bytes)
    if rank == 0:
        events.emit("checkpoint_saved", step=step, seconds=saved.seconds, bytes=saved.bytes, path=saved.path)
        _prune(store, attempt.final, max(1, keep_last))
    return saved


class _Attempt:
    """One rank's part in one save. Its methods run in the order of the file, with a barrier between them."""

    def __init__(self, store: Store, step: int, plan: Plan, rank: int) -> None:
        self.store, self.step, self.plan, self.rank = store, step, plan, rank
        self.final = self.pending = ""
        self.bytes = 0
        self._written = RankRecord()
        self._scalars: dict[str, Any] = {}
        self._best = False

    def guarded(self, work: Callable[[], None]) -> CheckpointError | None:
        """What went wrong, as an error to be raised once all ranks have passed their barriers."""
        try:
            work()
        except CheckpointError as error:
            return error
        except OSError as error:
            return self._rank_0_failed() if self.rank and isinstance(error, FileNotFoundError) else self._explain(error)
        except ShardwiseError as error:
            return CheckpointError(f"the checkpoint of step {self.step} was not written: {error}")
        return None

    def prepare(self, scalars: Mapping[str, Any], best: bool) -> None:
        # before the first barrier, so that all ranks see the same folders
        self.final = folder_name(self.step, committed(self.store))
        self.pending = pending(self.final)
        if self.rank == 0:
            for folder in filter(is_pending, self.store.folders()):
                self.store.remove(folder)
            self._scalars, self._best = pack(dict(scalars)), best
            self.store.create(self.pending)

    def write(self, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> None:
        shares = _shares(tensors, shapes, self.plan, self.rank)
        name = file_name(self.rank)
        pieces = {key: tensor for share in shares.values() for key, tensor in share.pieces.items()}
        digest = hashlib.sha256()
        counter = _Counter()
        self.store.write(self.pending, name, counter.count(stream(pieces, digest)))
        entries = {
            key: Entry(share.dtype, share.shape, tuple(Piece(name, box.offset, box.shape) for box in share.boxes))
            for key, share in shares.items()
        }
        self._written = RankRecord(tensors=entries, file=FileFacts(counter.bytes, digest.hexdigest()))

    def record(self, failure: CheckpointError | None) -> None:
        """Tell rank 0; a record that cannot be written tells it too."""
        record = RankRecord(failure=str(failure)) if failure else self._written
        try:
            self.store.write(self.pending, record_name(self.rank), [msgspec.json.encode(record)], durable=False)
        except OSError:
            return

    def commit(self) -> None:
        records = [self._record_of(rank) for rank in range(self.plan.ranks)]
        manifest = Manifest(
            version=VERSION,
            step=self.step,
            plan=self.plan,
            tensors=_merge(records),
            files={file_name(rank): record.file for rank, record in enumerate(records) if record.file},
            scalars=self._scalars,
            best=self._best,
        )
        for rank in range(self.plan.ranks):
            self.store.discard(self.pending, record_name(rank))
        self.store.write(self.pending, MANIFEST, [encode(manifest)])
        self.store.publish(self.pending, self.final)
        self.bytes = manifest.bytes

    def confirm(self) -> None:
        if self.final not in self.store.folders():
            raise self._rank_0_failed()

    def abandon(self) -> None:
        """Rank 0 clears away; what it cannot remove now, the next save will."""
        if self.rank == 0 and self.pending:
            try:
                if self.pending in self.store.folders():
                    self.store.remove(self.pending)
            except OSError:
                return

    def _record_of(self, rank: int) -> RankRecord:
        try:
            record = msgspec.json.decode(self.store.read(self.pending, record_name(rank)), type=RankRecord)
        except (FileNotFoundError, msgspec.DecodeError):  # on a full disk it may be there and empty
            record = RankRecord(failure=f"rank {rank} left no record; its log has the reason, most often a full disk.")
        if record.failure:
            raise CheckpointError(f"rank {rank}: {record.failure}" if rank else record.failure)
        return record

    def _rank_0_failed(self) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint of step {self.step} was not written because a rank could not write its share; the message "
            "of rank 0 has the reason. Earlier checkpoints are untouched."
        )

    def _explain(self, error: OSError) -> CheckpointError:
        reason = error.strerror or str(error)
        return CheckpointError(
            f"the checkpoint of step {self.step} could not be written to {self.store.where(self.final)}: {reason}. "
            "Make room there or make the folder writable, or choose another place for the run. "
            "Earlier checkpoints are untouched."
        )


class _Share(Struct):
    """What this rank writes of one tensor: `pieces` are views of it by their key in the file."""

    dtype: str
    shape: Shape
    boxes: list[Box]
    pieces: dict[str, torch.Tensor]


class _Counter:
    def __init__(self) -> None:
        self.bytes = 0

    def count(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self.bytes += len(chunk)
            yield chunk


def _shares(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], plan: Plan, rank: int
) -> dict[str, _Share]:
    found: dict[str, _Share] = {}
    for name, tensor in tensors.items():
        shape = tuple(shapes.get(name, tensor.shape))
        expected = local_shape(name, shape, plan, rank)
        if tuple(local_part(tensor).shape) != expected:
            raise CheckpointError(
                f"the tensor '{name}' of rank {rank} has the shape {tuple(local_part(tensor).shape)}, but under "
                f"the plan '{plan}' a tensor of {shape} has {expected} there. Pass its global shape in `shapes`."
            )
        found[name] = _Share(dtype_name(tensor, name), shape, [], {})
    sizes = {name: (share.shape, tensors[name].element_size()) for name, share in found.items()}
    for name, box in written_by(sizes, plan, rank):
        share = found[name]
        share.boxes.append(box)
        share.pieces[key_of(name, share.shape, box)] = _view(name, share.shape, tensors[name], box, plan, rank)
    return found


def _view(name: str, shape: Shape, tensor: torch.Tensor, box: Box, plan: Plan, rank: int) -> torch.Tensor:
    """The elements of the global `box` in this rank's local tensor."""
    held = boxes(name, shape, plan, rank)
    for outer, start in zip(held, local_offsets(held), strict=True):
        inner = box.within(outer)
        if all(o >= 0 and o + s <= n for o, s, n in zip(inner.offset, inner.shape, outer.shape, strict=True)):
            place = Box(tuple(a + b for a, b in zip(inner.offset, start, strict=True)), box.shape)
            return local_part(tensor)[place.slices]
    raise AssertionError(f"{box} of {name} is not on rank {rank}")


def _merge(records: list[RankRecord]) -> dict[str, Entry]:
    """All ranks' entries; raises CheckpointError when they disagree or leave a hole."""
    found: dict[str, Entry] = {}
    for rank, record in enumerate(records):
        for name, entry in record.tensors.items():
            known = found.get(name, Entry(entry.dtype, entry.shape, ()))
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"rank {rank} has '{name}' as {entry.dtype} of {entry.shape}, another rank as {known.dtype} of "
                    f"{known.shape}. All ranks must build the same model."
                )
            found[name] = Entry(entry.dtype, entry.shape, known.pieces + entry.pieces)
    for name, entry in found.items():
        if not covers([piece.box for piece in entry.pieces], entry.shape):
            raise CheckpointError(
                f"the ranks' pieces of '{name}' do not cover it. All ranks must build the same model."
            )
    return found


def _prune(store: Store, newest: str, keep_last: int) -> None:
    """Delete what is older than the last `keep_last` whole checkpoints up to `newest`, but for the newest best one.

    A later step than that of `newest` belongs to a future that was given up; it is left alone until that step is
    saved again.
    """
    try:
        folders = committed(store)
        kept, best, older = [newest], "", folders[folders.index(newest) + 1 :]
        for folder in [newest, *older]:
            try:
                manifest = read(store, folder)
            except DamagedCheckpoint:
                continue
            best = best or (folder if manifest.best else "")
            if len(kept) < keep_last and step_of(folder) != step_of(kept[-1]) and sizes_agree(store, manifest):
                kept.append(folder)
        for folder in older:
            last = step_of(kept[-1]) if len(kept) == keep_last else -1
            superseded = step_of(folder) in map(step_of, kept)
            if folder not in kept and folder != best and (superseded or step_of(folder) < last):
                store.remove(folder)
    except (OSError, CheckpointError) as error:
        events.emit("warning", message=f"an old checkpoint could not be deleted: {error}")
