"""Collectives made of a group's own: sums in the fixed tree, broadcasts of many tensors, gathers of uneven rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor
from torch.distributed import Work

from shardwise.comm.group import Group
from shardwise.comm.tree import Node, owners, tree_sum


class TreeSum:
    """The sum over all ranks of flat partial sums, one for each canonical node, in the tree's order: bit for bit fixed.

    `start` sends, `finish` waits and returns the sum in the first tensor of this rank's. With one node on each of two
    ranks that is an all-reduce (a + b has one value); else every rank sums one piece of the tensor and hands it round,
    which costs each rank its number of nodes times the bytes out and the bytes of the tensor back.
    """

    def __init__(self, group: Group, total: int) -> None:
        self._group = group
        self._total = total
        self._owners = owners(group.size(), total)
        self._simple = group.size() == 2 and all(len(nodes) == 1 for nodes in self._owners.values())

    def start(self, partials: Sequence[Tensor]) -> TreeExchange:
        """`partials` are 1-D, alike, and in the order of this rank's nodes; a rank without nodes gives one of zeros."""
        if self._simple:
            return TreeExchange(self._group.all_reduce(partials[0]), partials[0], None)
        ranks, rank = self._group.size(), self._group.rank()
        piece = -(-partials[0].numel() // ranks)
        mine = self._owners[rank]
        padded = partials[0].new_zeros(ranks, max(1, len(mine)), piece)
        for index, partial in enumerate(partials[: len(mine)]):
            for target in range(ranks):
                part = partial[target * piece : (target + 1) * piece]
                padded[target, index, : part.numel()] = part
        sent = [len(mine) * piece] * ranks
        received = [len(self._owners[r]) * piece for r in range(ranks)]
        arrived = padded.new_empty(sum(received))
        flat = padded.reshape(-1) if mine else padded.new_empty(0)
        work = self._group.all_to_all_single(arrived, flat, received, sent)
        return TreeExchange(work, partials[0], (self, arrived, piece))

    def _finish(self, result: Tensor, arrived: Tensor, piece: int) -> None:
        nodes: list[Node] = [node for rank in range(self._group.size()) for node in self._owners[rank]]
        total = tree_sum(zip(nodes, arrived.view(-1, piece), strict=True), self._total, torch.add)
        whole = result.new_empty(self._group.size() * piece)
        self._group.all_gather_single(whole, total.contiguous()).wait()
        result.copy_(whole[: result.numel()])


class TreeExchange:
    """A tree sum under way."""

    def __init__(self, work: Work, result: Tensor, rest: tuple[TreeSum, Tensor, int] | None) -> None:
        self._work = work
        self._result = result
        self._rest = rest

    def wait(self) -> Tensor:
        """Every rank's: the sum, in the first tensor that this rank gave to `start`."""
        self._work.wait()
        if self._rest is not None:
            tree, arrived, piece = self._rest
            tree._finish(self._result, arrived, piece)
            self._rest = None
        return self._result


def average_all(tensors: Sequence[Tensor], group: Group) -> None:
    """Every tensor becomes its mean over the ranks, in place, in one message for each dtype and device."""
    for alike in _alike(tensors):
        flat = torch.cat([t.reshape(-1) for t in alike])
        group.all_reduce(flat, dist.ReduceOp.AVG).wait()
        for tensor, piece in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(piece.view_as(tensor))


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Without their autograd history, together by dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    return list(kinds.values())


def broadcast_all(tensors: Sequence[Tensor], group: Group, *, root: int = 0) -> None:
    """Give every rank the values of `root`, in place, in one message for each dtype and device."""
    for alike in _alike(tensors):
        flat = torch.cat([t.reshape(-1) for t in alike])
        as_bytes = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
        group.broadcast([as_bytes], root=root).wait()
        if group.rank() != root:
            pieces = flat.split([t.numel() for t in alike])
            for tensor, piece in zip(alike, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))


def largest(values: Sequence[float], group: Group | None, device: torch.device | str = "cpu") -> list[float]:
    """The largest of each value over the ranks, as float64."""
    if group is None:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=device)
    group.all_reduce(found, dist.ReduceOp.MAX).wait()
    return list(map(float, found.tolist()))


def totals(values: Sequence[float], group: Group | None, device: torch.device | str = "cpu") -> list[float]:
    """The sum of each value over the ranks, as float64."""
    if group is None:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=device)
    group.all_reduce(found).wait()
    return list(map(float, found.tolist()))


def gather_bytes(raw: bytes, group: Group, device: torch.device | str = "cpu") -> list[bytes]:
    """What every rank gave, in rank order; the lengths may differ."""
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
    sizes[group.rank()] = len(raw)
    group.all_reduce(sizes).wait()
    longest = max(1, int(sizes.max()))
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else mine[:0]
    everything = mine.new_empty(group.size() * longest)
    group.all_gather_single(everything, mine).wait()
    rows = everything.view(group.size(), longest).cpu()
    return [bytes(rows[r, : int(sizes[r])].numpy().tobytes()) for r in range(group.size())]


def gather_rows(mine: Tensor, rows: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks below each other, in rank order; rank r has `rows[r]` of them, all alike otherwise."""
    most = max(rows)
    padded = mine.new_zeros(most, *mine.shape[1:])
    padded[: mine.shape[0]] = mine
    whole = padded.new_empty(group.size() * most, *mine.shape[1:])
    as_bytes = (whole.view(torch.uint8), padded.view(torch.uint8)) if mine.dtype == torch.bool else (whole, padded)
    group.all_gather_single(as_bytes[0], as_bytes[1]).wait()
    return torch.cat([whole[r * most : r * most + count] for r, count in enumerate(rows)])
