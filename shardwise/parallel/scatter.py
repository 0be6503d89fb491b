"""The gradients of the shard axis: each rank gets the sum of its rows (ZeRO stages 2 and 3)."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.comm.collectives import totals
from shardwise.comm.group import Group
from shardwise.comm.mesh import Mesh
from shardwise.errors import JobError, SpecError
from shardwise.parallel import statistics
from shardwise.parallel.clip import norm_of
from shardwise.parallel.rows import Cut, Rows
from shardwise.parallel.statistics import COLUMNS, Totals
from shardwise.parallel.units import Unit, Units

OWN_LOOP = "a loop that calls backward itself does not go with zero=2 and 3. Use run.step or sw.session, or zero=1."
PIECES = 16  # that the gradients leave in, at most, where no units say how


class _Bundle:
    """Gradients that leave together: of one unit's trained parameters of one dtype."""

    def __init__(self, members: list[int], cuts: Sequence[Cut], unit: Unit | None, ranks: int) -> None:
        self.members, self.unit = members, unit
        self.cuts = [cuts[index] for index in members]
        self.rows = Rows([cut.whole.shape for cut in self.cuts], ranks)
        self.missing = len(members)
        self.sum: Tensor | None = None  # of this rank's rows, over the microbatches so far


class Scatter:
    """The interface of `Reducer` where gradients are cut by rows.

    Each microbatch's gradients of a unit leave as soon as they are complete, in one order on all ranks, and are added
    to this rank's rows; with `staged` (a pipeline) once for all microbatches, when `collect` is told. Over the data
    axis the rows are summed once a step. What has no rows (0-dim) is summed over all ranks.

    After `finish` the rows' gradients are in `.grad` where the rows are parameters of their own (zero=3), else in
    `rows`, by name.
    """

    def __init__(
        self, cuts: Sequence[Cut], plain: Sequence[tuple[str, nn.Parameter]], mesh: Mesh, units: Units | None
    ) -> None:
        shard, second = mesh.axis("shard"), mesh.second_group("shard", "gradients")
        assert shard.group is not None
        assert second is not None
        self.rows: dict[str, Tensor] = {}
        self._cuts, self._plain, self._units = list(cuts), list(plain), units
        self._shard: Group = shard.group
        self._scatter: Group = second  # gradients leave in an order of their own, beside what is gathered
        self._data, self._batch = mesh.axis("data").group, mesh.axis("batch")
        self._device = mesh.device
        self._staged = mesh.plan.pipeline > 1
        self._reports: dict[int, Tensor] = {}
        self._used: list[int] = []
        self._seen: set[int] = set()  # of one microbatch
        self._bundles: list[_Bundle] = []
        self._bundle_of: dict[int, _Bundle] = {}
        self._next = 0
        self._travelling: tuple[_Bundle, Tensor, dist.Work] | None = None
        self._packed: dict[torch.dtype, Tensor] = {}
        self._waited = 0.0
        self._signature: tuple[bool, ...] = ()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._arrange()

    # A step.

    def begin(self) -> None:
        self._arrange()
        self.clear()
        self._reports, self._used, self._seen = {}, [0] * len(self._cuts), set()
        self._waited = 0.0

    def begin_micro(self, *, shard: int | None = None, last: bool) -> None:
        return None

    def report(self, slot: int, loss_sum: Tensor, weight: Tensor) -> None:
        pair = statistics.pair(loss_sum, weight)
        self._reports[slot] = self._reports[slot] + pair if slot in self._reports else pair

    def collect(self, names: Collection[str]) -> None:
        """Gradients of these parameters are complete, however they came to the whole's `.grad`."""
        for bundle in self._bundles:
            bundle.missing -= sum(cut.name in names for cut in bundle.cuts)
        self._advance()

    def end_micro(self) -> None:
        """A microbatch's backward is over: what it did not use counts as zero."""
        if not self._staged:
            self._flush()

    def finish(self, *, mean: bool = False) -> tuple[Totals, float]:
        """Send what is left and wait for all of it; the totals of `report`, and the seconds spent waiting."""
        if mean:
            raise SpecError(OWN_LOOP)
        if self._staged:
            self._flush()
        if self._data is not None:
            works = [self._data.all_reduce(bundle.sum) for bundle in self._bundles if bundle.sum is not None]
            self._wait(works)
        pairs, used = self._exchange_row()
        for (_, p), count in zip(self._plain, used[len(self._cuts) :], strict=True):
            if count:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self._wait([self._batch_group.all_reduce(p.grad)])
        for bundle in self._bundles:
            assert bundle.sum is not None
            views = bundle.rows.views(bundle.sum, self._shard.rank())
            for index, cut, view in zip(bundle.members, bundle.cuts, views, strict=True):
                self._hand_out(cut, view if used[index] else None)
        if self._units is not None:
            self._units.close()
            self._units.refuse_unlike()
        return statistics.total(pairs, tree=False), self._waited

    # What the step does with the sums.

    def norm(self, without: Collection[str] | None = None) -> float:
        """The 2-norm of all gradients that `finish` left; the same on every rank. Collective over the shard axis."""
        mine = norm_of([grad for name, grad in self._gradients() if name not in (without or ())])
        square = totals([mine * mine], self._shard, self._device)[0]
        alone = norm_of([p.grad for n, p in self._plain if p.grad is not None and n not in (without or ())])
        return math.sqrt(square + alone * alone) if square >= 0 else square

    def zero(self, name: str) -> None:
        """After `finish`: a parameter that no rank of this axis used has a gradient of zeros."""
        for cut in self._cuts:
            if cut.name == name:
                self._hand_out(cut, torch.zeros_like(cut.own))
        for plain, p in self._plain:
            if plain == name:
                p.grad = torch.zeros_like(p)

    def scale(self, factor: float) -> None:
        grads = [grad for _, grad in self._gradients()] + [p.grad for _, p in self._plain if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    def clear(self) -> None:
        """Forget the gradients; parameters that were gathered are given back."""
        if self._travelling is not None:  # the step failed, and the message may still be read
            self._travelling, self._packed = None, {}
        for cut in self._cuts:
            cut.whole.grad = cut.own.grad = None
        for _, p in self._plain:
            p.grad = None
        for bundle in self._bundles:
            bundle.sum = None
            bundle.missing = len(bundle.members)
        self.rows = {}
        self._next = 0
        self._reset_units()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def reopen(self) -> None:
        raise AssertionError("local updates do not go with a shard axis")

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        raise SpecError(OWN_LOOP)
        yield

    # Inside.

    @property
    def _batch_group(self) -> Group:
        assert self._batch.group is not None
        return self._batch.group

    def _arrange(self) -> None:
        """Bundles of what is trained now, in the order in which backward mostly comes by."""
        signature = tuple(cut.own.requires_grad for cut in self._cuts)
        if signature == self._signature:
            return
        self._signature = signature
        self.close()
        for index, cut in enumerate(self._cuts):
            cut.whole.requires_grad_(cut.own.requires_grad)
            if cut.own.requires_grad:
                hook = functools.partial(self._arrived, index)
                self._hooks.append(cut.whole.register_post_accumulate_grad_hook(hook))
        parts = self._units.each[1:] if self._units else ()
        unit_of = {id(cut): unit for unit in parts for cut in unit.cuts}
        groups: dict[tuple[int, torch.dtype], list[int]] = {}
        for index, cut in enumerate(self._cuts):
            if cut.own.requires_grad:
                groups.setdefault((id(unit_of.get(id(cut))), cut.whole.dtype), []).append(index)
        self._bundles = []
        for members in reversed(groups.values()):
            unit = unit_of.get(id(self._cuts[members[0]]))
            pieces = [members] if unit is not None else self._in_pieces(members)
            self._bundles += [_Bundle(piece, self._cuts, unit, self._shard.size()) for piece in pieces]
        self._bundle_of = {index: bundle for bundle in self._bundles for index in bundle.members}

    def _in_pieces(self, members: Sequence[int]) -> list[list[int]]:
        """Parameters that are in no unit leave some at a time, the last ones first."""
        least = sum(cut.whole.numel() for cut in self._cuts) // PIECES
        pieces: list[list[int]] = [[]]
        for index in reversed(members):
            if sum(self._cuts[i].whole.numel() for i in pieces[-1]) > least:
                pieces.append([])
            pieces[-1].insert(0, index)
        return pieces

    def _arrived(self, index: int, _: nn.Parameter) -> None:
        if self._staged:
            return
        if index in self._seen:
            raise JobError(
                f"the gradient of '{self._cuts[index].name}' arrived again after it had been sent: activation "
                "checkpointing is reentrant. Use use_reentrant=False."
            )
        self._seen.add(index)
        bundle = self._bundle_of[index]
        bundle.missing -= 1
        self._advance()

    def _flush(self) -> None:
        """Send what is left."""
        for bundle in self._bundles[self._next :]:
            bundle.missing = 0
        self._advance()
        self._settle()
        self._next = 0
        for bundle in self._bundles:
            bundle.missing = len(bundle.members)
        self._seen = set()
        self._reset_units()

    def _reset_units(self) -> None:
        """Units are closed, but for what is in none, until the step ends."""
        for unit in self._units.each[1:] if self._units is not None else ():
            unit.reset(sum(bundle.unit is unit for bundle in self._bundles))

    def _advance(self) -> None:
        while self._next < len(self._bundles) and self._bundles[self._next].missing <= 0:
            self._send(self._bundles[self._next])
            self._next += 1

    def _send(self, bundle: _Bundle) -> None:
        self._settle()  # one message at a time, so that one buffer is enough
        grads = [cut.whole.grad for cut in bundle.cuts]
        for index, cut, grad in zip(bundle.members, bundle.cuts, grads, strict=True):
            self._used[index] |= int(grad is not None)
            if grad is not None and grad.layout != torch.strided:
                raise JobError(
                    f"the gradient of '{cut.name}' is sparse, which a shard axis cannot cut. Build its Embedding with "
                    "sparse=False."
                )
        packed = self._buffer(bundle)
        bundle.rows.pack(grads, packed)
        for cut in bundle.cuts:
            cut.whole.grad = None
        if bundle.unit is not None:
            bundle.unit.sent()
        piece = packed.new_empty(bundle.rows.size)
        self._travelling = bundle, piece, self._scatter.reduce_scatter_single(piece, packed)

    def _buffer(self, bundle: _Bundle) -> Tensor:
        dtype, needed = bundle.cuts[0].whole.dtype, bundle.rows.size * self._shard.size()
        if dtype not in self._packed or self._packed[dtype].numel() < needed:
            most = max(b.rows.size for b in self._bundles if b.cuts[0].whole.dtype == dtype) * self._shard.size()
            self._packed[dtype] = self._scatter.zeros(most, dtype, bundle.cuts[0].whole.device)
        return self._packed[dtype][:needed]

    def _settle(self) -> None:
        if self._travelling is None:
            return
        bundle, piece, work = self._travelling
        self._travelling = None
        self._wait([work])
        bundle.sum = piece if bundle.sum is None else bundle.sum.add_(piece)

    def _wait(self, works: Sequence[dist.Work]) -> None:
        began = time.perf_counter()
        for work in works:
            work.wait()
        self._waited += time.perf_counter() - began

    def _exchange_row(self) -> tuple[list[tuple[float, float]], list[float]]:
        """Everybody's losses and weights, and how many ranks used each parameter."""
        cut_at = self._batch.size * COLUMNS
        used = [*self._used, *(int(p.grad is not None) for _, p in self._plain)]
        row = torch.zeros(cut_at + len(used), device=self._device)
        statistics.fill(row[:cut_at], self._reports)
        row[cut_at:] = torch.tensor(used, dtype=row.dtype)
        self._wait([self._batch_group.all_reduce(row)])
        found = row.tolist()
        return statistics.decode(found[:cut_at]), found[cut_at:]

    def _hand_out(self, cut: Cut, grad: Tensor | None) -> None:
        if cut.own is not cut.whole:
            cut.own.grad = grad
        elif grad is not None:
            self.rows[cut.name] = grad

    def _gradients(self) -> list[tuple[str, Tensor]]:
        if self.rows:
            return list(self.rows.items())
        return [(c.name, c.own.grad) for c in self._cuts if c.own is not c.whole and c.own.grad is not None]
