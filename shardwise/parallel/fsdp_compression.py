"""Compressed gradients for FSDP2: a reduce-scatter of encoded pieces in the place of `fully_shard`'s own.

What is private to torch's FSDP2 is in this file only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from shardwise.comm.codec import Codec
from shardwise.comm.coded import is_short
from shardwise.comm.pieces import PieceSum, settle
from shardwise.comm.residuals import fitting, shared, wide
from shardwise.errors import JobError

STEPS, RESIDUAL = "steps", "residual."


class Sharded(NamedTuple):
    """A parameter as FSDP2 shards it: its shape before that, and the dimension that is cut."""

    name: str
    shape: tuple[int, ...]
    dim: int

    def chunk(self, ranks: int) -> int:
        """Elements of a rank's padded part."""
        if self.dim:
            return math.prod(self.shape) // ranks
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])

    def cut(self, whole: Tensor, ranks: int) -> Tensor:
        """[ranks, chunk]: the parts of all ranks, padded with zeros."""
        if self.dim:
            return torch.stack([part.reshape(-1) for part in whole.chunk(ranks, self.dim)])
        flat = whole.reshape(-1)
        return F.pad(flat, (0, ranks * self.chunk(ranks) - flat.numel())).view(ranks, -1)

    def join(self, parts: Tensor) -> Tensor:
        """The whole tensor again."""
        if self.dim:
            shape = [*self.shape[: self.dim], self.shape[self.dim] // len(parts), *self.shape[self.dim + 1 :]]
            return torch.cat([part.view(shape) for part in parts], self.dim)
        return parts.reshape(-1)[: math.prod(self.shape)].view(self.shape)


class CompressedReduceScatter(ReduceScatter):
    """The reduce-scatter of one `fully_shard` group: every rank sends the others their pieces encoded, and adds what
    comes in rank order; a rank's own piece is not encoded, nor are short vectors.

    With `feedback` a rank keeps what its encodings left out, for the next step: float32, as long as the whole gradient.
    `known` are the group's parameters (torch's `FSDPParam`) by name. A step in which one that is trained has no
    gradient is exact, and so are the first `start` ones and all while `exact` is true.
    """

    def __init__(self, codec: Codec, known: Sequence[tuple[str, Any]], *, feedback: bool, start: int) -> None:
        self._codec = codec
        self._known = known
        self._feedback = feedback
        self._start = start
        self._members: list[Sharded] = []
        self._vectors: list[slice] = []  # where those that are not encoded lie in a rank's part
        self._residual: Tensor | None = None  # [ranks, elements of a part], as `_members` lie in it
        self._parked: dict[str, Tensor] = {}  # whole residuals of what is not in it
        self._pieces: PieceSum | None = None
        self.steps = 0
        self.exact = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:  # type: ignore[override]
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        self.steps += 1
        ranks = group.size()
        members = [
            Sharded(name, tuple(each._orig_size), each.fsdp_placement.dim)
            for name, each in self._known
            if each.sharded_param.requires_grad
        ]
        fits = sum(each.chunk(ranks) for each in members) * ranks == input_tensor.numel()
        if fits:
            self._arrange(members, ranks, input_tensor)
        if not fits or self.exact or self.steps <= self._start:
            if fits and self._residual is not None:
                input_tensor.add_(self._residual.view(-1))
                self._residual.zero_()
            return _exact(output_tensor, input_tensor, group, op, async_op)
        output_tensor.copy_(self._sum(input_tensor, group)).mul_(_factor(op, ranks))
        return None

    def _sum(self, gradients: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The sum of this rank's piece; `gradients` is scratch afterwards."""

        def all_to_all(output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int]) -> Any:
            return dist.all_to_all_single(output, input, list(received), list(sent), group=group, async_op=True)

        ranks, rank = group.size(), group.rank()
        exact = self._taken_out(gradients.view(ranks, -1))
        if self._pieces is None:
            size = gradients.numel() // ranks
            bounds = [(r * size, (r + 1) * size) for r in range(ranks)]
            self._pieces = PieceSum(self._codec, bounds, rank, gradients.device, tail=exact[0].nbytes)
        pieces = self._pieces
        residual = self._residual.view(-1) if self._residual is not None else None
        values = (gradients if residual is None else residual.add_(gradients)).float()
        own = values.view(ranks, -1)[rank].clone()
        work = pieces.start(values, all_to_all, list(exact.view(torch.uint8)))
        if residual is not None:
            settle(residual, gradients, lambda out: pieces.sent(values, out))
        work.wait()
        total, vectors = pieces.finish(own), exact[rank]
        pieces.sum_of_tails(vectors)
        for part, summed in zip(self._vectors, vectors.split([v.stop - v.start for v in self._vectors]), strict=True):
            total[part] = summed
        return total

    def _taken_out(self, gradients: Tensor) -> Tensor:
        """Short vectors' gradients and residuals [ranks, elements of a part], which are zeros there from now on."""
        found = [gradients.new_empty(len(gradients), 0, dtype=wide(gradients.dtype))]
        for part in self._vectors:
            found.append(gradients[:, part].to(found[0].dtype, copy=True))
            gradients[:, part].zero_()
            if self._residual is not None:
                found[-1].add_(self._residual[:, part])
                self._residual[:, part].zero_()
        return torch.cat(found, dim=1)

    # What is kept.

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._known]

    def state(self) -> dict[str, Tensor]:
        """This rank's residuals by parameter, each in the shape of the whole parameter."""
        return self._parked | self._whole()

    def load_state(self, residuals: Mapping[str, Tensor]) -> None:
        """Take over this rank's residuals; they are laid out at the next step."""
        self._parked = dict(residuals)
        self._members, self._residual = [], None

    def _whole(self) -> dict[str, Tensor]:
        if self._residual is None:
            return {}
        parts = self._residual.split([each.chunk(len(self._residual)) for each in self._members], dim=1)
        return {each.name: each.join(part) for each, part in zip(self._members, parts, strict=True)}

    def _arrange(self, members: list[Sharded], ranks: int, like: Tensor) -> None:
        if members == self._members:
            return
        self._parked |= {name: whole.clone() for name, whole in self._whole().items()}
        self._members, self._pieces = members, None
        stops = list(itertools.accumulate(each.chunk(ranks) for each in members))
        ends = [(stop - each.chunk(ranks), stop) for each, stop in zip(members, stops, strict=True)]
        self._vectors = [slice(*end) for each, end in zip(members, ends, strict=True) if is_short(each.shape)]
        if not self._feedback:
            return
        kept = [self._parked.pop(each.name, None) for each in members]
        self._residual = torch.zeros(ranks, like.numel() // ranks, dtype=wide(like.dtype), device=like.device)
        parts = self._residual.split([each.chunk(ranks) for each in members], dim=1)
        for each, whole, part in zip(members, kept, parts, strict=True):
            if whole is not None:
                part.copy_(each.cut(fitting(whole, each.name, each.shape), ranks))


class FsdpCompression:
    """The compressed reduce-scatters of a module, and what they keep. Made by `compress_gradients`."""

    def __init__(self, scatters: list[CompressedReduceScatter], ranks: int) -> None:
        self._scatters = scatters
        self._ranks = ranks

    def set_exact(self, *, exact: bool) -> None:
        """Whether steps from now on are exact; what was left out until then goes into the first of them."""
        for each in self._scatters:
            each.exact = exact

    def state(self) -> dict[str, Tensor]:
        """`residual.NAME`: what this rank left out of a parameter's gradient, in the shape of the whole parameter."""
        found = {STEPS: torch.tensor(max(each.steps for each in self._scatters))}
        for each in self._scatters:
            found |= {RESIDUAL + name: kept for name, kept in each.state().items()}
        return found

    def load_state(self, ranks: Sequence[Mapping[str, Tensor]], rank: int) -> None:
        """Take over what the ranks of a checkpoint kept; with another number of them, what they left out is shared."""
        under = [{k.removeprefix(RESIDUAL): v for k, v in state.items() if k != STEPS} for state in ranks]
        mine = shared(under, rank, self._ranks)
        for each in self._scatters:
            each.steps = int(ranks[0].get(STEPS, torch.tensor(0)))
            each.load_state({name: kept for name, kept in mine.items() if name in each.names})


def compress_gradients(module: nn.Module, codec: Codec, *, feedback: bool = True, start: int = 0) -> FsdpCompression:
    """Let all `fully_shard`ed modules in `module` send their gradients through `codec` from the next backward on.

    With `feedback` (error feedback) every rank keeps 4 more bytes for each element of the whole gradients. The first
    `start` backward passes are exact. Raises JobError where nothing is sharded.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    scatters, ranks = [], 1
    for each in module.modules():
        if not isinstance(each, FSDPModule):
            continue
        for group in each._get_fsdp_state()._fsdp_param_groups:
            known = [(names[id(p.sharded_param)], p) for p in group.fsdp_params]
            scatter = CompressedReduceScatter(codec, known, feedback=feedback, start=start)
            each.set_custom_reduce_scatter(scatter)
            scatters.append(scatter)
            ranks = group.mesh_info.mesh.size()
    if not scatters:
        raise JobError("no module here is sharded by fully_shard, so there is no reduce-scatter to compress.")
    return FsdpCompression(scatters, ranks)


def _exact(output: Tensor, input: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool) -> dist.Work | None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name before torch 2.13
    work: dist.Work | None = scatter(output, input, op=op, group=group, async_op=async_op)
    return work


def _factor(op: Any, ranks: int) -> float:
    """What the sum is multiplied with. Raises JobError for an operation that is none of torch FSDP2's."""
    if op == dist.ReduceOp.SUM:
        return 1.0
    if op == dist.ReduceOp.AVG:
        return 1 / ranks
    if op == dist.ReduceOp.PREMUL_SUM:
        return float(op.__getstate__()[1])
    raise JobError(f"gradients that are reduced by {op} cannot be compressed: only sums and averages can.")
