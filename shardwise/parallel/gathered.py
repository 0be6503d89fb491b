"""A loss that couples samples, computed on the outputs of the whole global batch and counted once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from shardwise.comm.collectives import gather_bytes, gather_rows
from shardwise.errors import JobError
from shardwise.models.inputs import call
from shardwise.parallel.blame import shapes, user_code
from shardwise.parallel.contract import pair
from shardwise.parallel.coupling import SEPARATE, agree, batch_size
from shardwise.parallel.precision import LossScaler

if TYPE_CHECKING:
    from shardwise.parallel.parallelize import Replica


class Piece(NamedTuple):
    """One microbatch after its forward: the leaves of output and batch, which of them have a row for each sample."""

    shard: int | None
    rows: int
    leaves: list[Any]
    per_sample: list[bool]
    spec: TreeSpec


def gathered_step(
    replica: Replica, micro: Sequence[Any], loss: Callable[[Any, Any], Any], forward: Any, scaler: LossScaler | None
) -> None:
    """Forward of all microbatches (their graphs are kept), one gather, the loss on everything, then their backwards.

    Every rank with samples computes the same loss and sends its gradient back through its own rows only; leaves of
    the output without a row for each sample (a learned temperature) are differentiated on the first rank alone, and
    the first rank reports the loss. The memory is that of the whole local batch, whatever the microbatches.
    Raises JobError where a batch holds something else than tensors for each sample.
    """
    span, pieces = replica.mesh.timeline.span, []
    for index, one in enumerate(micro):
        with span("forward", 0, index):
            pieces.append(_forward(replica, index, one, forward))
    counts, sources = _meet(replica, pieces)
    if not any(counts):
        return
    whole = [_gather(replica, pieces, source, counts, index) for index, source in enumerate(sources)]
    if not pieces:
        if replica.fresh:
            agree(replica, loss, verdict=SEPARATE, guess=0.0).settle()
        return
    grads = _loss(replica, loss, whole, pieces[0].spec, scaler, reports=not any(counts[: replica.axis.rank]))
    first_row = sum(counts[: replica.axis.rank])
    for index, piece in enumerate(pieces):
        replica.reducer.begin_micro(shard=piece.shard, last=index == len(pieces) - 1)
        with span("backward", 0, index):
            _backward(piece, grads, first_row, shared=first_row == 0)
        first_row += piece.rows


def gathered_outputs(replica: Replica, outputs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """`(output, batch)` of all ranks' batches of one round together, on the first rank that has one; collective.

    `outputs` are this rank's own; ranks may have different numbers of them. Raises JobError as `gathered_step` does.
    """
    own = iter(outputs)
    while True:
        found = next(own, None)
        pieces = [] if found is None else [_piece(None, *found)]
        counts, sources = _meet(replica, pieces)
        if not any(counts):
            return
        whole = [_gather(replica, pieces, source, counts, index) for index, source in enumerate(sources)]
        if pieces and not any(counts[: replica.axis.rank]):
            yield tree_unflatten(whole, pieces[0].spec)


def _forward(replica: Replica, index: int, one: Any, forward: Any) -> Piece:
    replica.before_forward(index, one.shard)
    replica.seed(one.stream)
    batch = replica.formats.place(one.batch)
    with replica.formats.forward(), user_code("the model", about=lambda: f"The batch was {shapes(batch)}."):
        output = call(replica.module, batch, forward)
    replica.after_forward(one.shard)
    return _piece(one.shard, output, batch)


def _piece(shard: int | None, output: Any, batch: Any) -> Piece:
    rows = batch_size(batch)
    leaves, spec = tree_flatten((output, batch))
    return Piece(shard, rows, leaves, [_is_rows(leaf, rows) for leaf in leaves], spec)


def _is_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == rows


def _meet(replica: Replica, pieces: list[Piece]) -> tuple[list[int], list[Any]]:
    """Samples of every rank, and for each leaf `[dtype, shape of a row]`, or None where it has no rows."""
    leaves: list[Any] = []
    if pieces:
        for leaf, rows in zip(pieces[0].leaves, pieces[0].per_sample, strict=True):
            leaves.append([str(leaf.dtype).removeprefix("torch."), list(leaf.shape[1:])] if rows else None)
    count = sum(piece.rows for piece in pieces)
    if replica.axis.group is None:
        return [count], leaves
    mine = {"rows": count, "leaves": leaves}
    told = [json.loads(raw) for raw in gather_bytes(json.dumps(mine).encode(), replica.axis.group, replica.mesh.device)]
    active = [one["leaves"] for one in told if one["rows"]]
    if any(one != active[0] for one in active):
        raise JobError(
            "coupled='gather' needs outputs and batches of one shape (but for the number of samples) on every rank; "
            f"they have {active}. Pad the batches to one length."
        )
    return [one["rows"] for one in told], active[0] if active else []


def _gather(replica: Replica, pieces: list[Piece], source: Any, counts: list[int], index: int) -> Any:
    """Leaf `index` of the whole global batch, detached."""
    if source is None:
        leaf = pieces[0].leaves[index] if pieces else None
        if isinstance(leaf, (str, bytes)):
            raise JobError(
                "coupled='gather' can only gather tensors, but the batch holds text. Let collate leave it out."
            )
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
    dtype, shape = getattr(torch, source[0]), source[1]
    if pieces:
        mine = torch.cat([piece.leaves[index].detach() for piece in pieces])
    else:
        mine = torch.empty(0, *shape, dtype=dtype, device=replica.mesh.device)
    return mine if replica.axis.group is None else gather_rows(mine, counts, replica.axis.group)


def _loss(
    replica: Replica, loss: Any, whole: list[Any], spec: TreeSpec, scaler: LossScaler | None, *, reports: bool
) -> list[Tensor | None]:
    """The gradient of the scaled loss sum with respect to every leaf that has one."""
    for leaf in whole:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_(True)
    output, batch = tree_unflatten(whole, spec)
    with replica.formats.forward():
        total, weight = pair(loss, output, batch)
    if replica.fresh:
        agree(replica, loss, verdict=SEPARATE, guess=float(weight)).settle()
    if reports:
        replica.reducer.report(replica.slot(0), total, weight)
    if not total.requires_grad:
        raise JobError(
            "the loss does not depend on the model's output; let it use the output without detach() or .item()."
        )
    with user_code("backward of the loss"):
        (total * replica.scale(scaler)).backward()
    return [leaf.grad if isinstance(leaf, Tensor) else None for leaf in whole]


def _backward(piece: Piece, grads: list[Tensor | None], first_row: int, *, shared: bool) -> None:
    tensors, seeds = [], []
    for leaf, rows, grad in zip(piece.leaves, piece.per_sample, grads, strict=True):
        if grad is None or not isinstance(leaf, Tensor) or not leaf.requires_grad:
            continue
        if rows:
            tensors.append(leaf)
            seeds.append(grad[first_row : first_row + piece.rows])
        elif shared:
            tensors.append(leaf)
            seeds.append(grad)
    if not tensors:
        raise JobError("the model's output does not depend on any parameter that requires a gradient.")
    with user_code("backward of the model"):
        torch.autograd.backward(tensors, seeds)
