"""The data axis: gradients of all ranks are summed while the backward pass still runs."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.comm.collectives import TreeSum
from shardwise.comm.exchange import Exchange
from shardwise.comm.mesh import Axis
from shardwise.comm.tree import Node, nodes, span
from shardwise.errors import JobError
from shardwise.parallel import statistics
from shardwise.parallel.buckets import Bucket
from shardwise.parallel.clip import norm_of
from shardwise.parallel.cuts import cut
from shardwise.parallel.statistics import COLUMNS, Totals

Named = Sequence[tuple[str, nn.Parameter]]


class Reducer:
    """Sums gradients over the ranks of an axis in flat buckets; after `finish` each `.grad` is a view of its bucket.

    A step is `begin`, then for each microbatch `begin_micro`, forward, `report`, backward, and one `finish`. Buckets
    leave in index order as soon as they are complete in the last microbatch, so all ranks send them in one order; the
    order follows rank 0's backward of the first step. A parameter that no rank used has `.grad` None after `finish`.
    With `shards` (exact mode) gradients are summed in the fixed tree over that many shards, whatever the ranks; with
    an `exchange` that is what sums them.

    Without `begin`, for loops that call `loss.backward()` themselves, every backward outside `no_sync` sends its
    gradients, and `finish(mean=True)` leaves the average over ranks.
    """

    def __init__(
        self,
        named: Callable[[], Named],
        axis: Axis,
        *,
        bucket_bytes: int,
        shards: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._named = named
        self._axis = axis
        self._bucket_bytes = bucket_bytes
        self._shards = shards
        self._exchange = exchange
        self._slots = shards or axis.size
        self._tree = TreeSum(axis.group, shards) if shards and axis.group is not None else None
        self._mine = span(axis.rank, axis.size, shards) if shards else Node(0, 0)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._place: list[tuple[Bucket, int]] = []
        self._buckets: list[Bucket] = []
        self._signature: tuple[int, ...] = ()
        self._arrivals: list[int] | None = []
        self._used: list[int] = []
        self._reports: dict[int, Tensor] = {}
        self._leaf: Node | None = None
        self._next = 0
        self._held: list[Tensor | None] = []
        self._begun = False
        self._moving = True
        self._sending = True
        self._norms: list[float] = []  # of each bucket, as it arrived
        self._mean = True  # a loop of the user's own sends averages before anybody called `begin`
        self._build()

    # A step.

    def begin(self) -> None:
        """Start a step of one or more microbatches; no gradient is left over from the one before."""
        self.refresh()
        self._reset()
        self.clear()
        self._mean = False
        self._sending = False

    def begin_micro(self, *, shard: int | None = None, last: bool) -> None:
        """Start one microbatch: the `last` one sends; in exact mode it computes logical shard `shard`."""
        self._sending = self._moving = last
        if self._shards is not None:
            assert shard is not None, "exact mode needs the shard of every microbatch"
            self._moving = last or shard % 2 == 1 or shard + 1 == self._mine.stop
            self._open_leaf(shard)
        if self._moving and self._begun:  # the hook adds what is held and what comes, straight into the bucket
            self._held = [parameter.grad for parameter in self._parameters]
            self.clear()
        self._begun = True

    def report(self, slot: int, loss_sum: Tensor, weight: Tensor) -> None:
        """Add a microbatch's loss sum and weight (0-dim) to what this rank sends; `slot` is the rank or the shard."""
        pair = statistics.pair(loss_sum, weight)
        self._reports[slot] = self._reports[slot] + pair if slot in self._reports else pair

    def collect(self, names: Collection[str]) -> None:
        """Gradients of these parameters are complete, however they came to `.grad`; send what that completes."""
        for index, name in enumerate(self._names):
            if name in names:
                self._used[index] = int(self._parameters[index].grad is not None)
                self._place[index][0].missing -= 1
                if self._arrivals is not None:
                    self._arrivals.append(index)
        self._advance()

    def finish(self, *, mean: bool = False) -> tuple[Totals, float]:
        """Send what is left, wait for all of it; the totals of `report` and the seconds spent waiting.

        Raises CommError when a collective fails, JobError when a gradient arrived twice.
        """
        self._mean = mean
        for bucket in self._buckets[self._next :]:
            bucket.missing = 0
        self._advance()
        waited = 0.0
        self._norms = []
        for bucket in self._buckets:
            if bucket.work is not None:
                began = time.perf_counter()
                bucket.work.wait()
                waited += time.perf_counter() - began
            bucket.settle()
            if bucket.parameters and not mean and self._shards is None:  # now: later buckets still travel
                self._norms.append(norm_of([bucket.current.body]))
        pairs, used = self._read_tail()
        self._hand_out(used)
        self._reset()
        return statistics.total(pairs, tree=self._shards is not None), waited

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in this block only accumulate."""
        before = self._sending, self._moving
        self._sending = self._moving = False
        try:
            yield
        finally:
            self._sending, self._moving = before

    # What the step does with the sums.

    def norm(self, without: Collection[str] | None = None) -> float:
        """The 2-norm of all gradients that `finish` left, accumulated in float32 or better; the same on every rank.

        In exact mode it is taken parameter by parameter, so that neither ranks nor buckets change a bit of it; so it is
        when those called `without` do not count, or gradients have changed since `finish`.
        """
        if self._shards is not None or without is not None:
            pairs = zip(self._names, self._parameters, strict=True)
            return norm_of([p.grad for name, p in pairs if p.grad is not None and name not in (without or ())])
        return math.hypot(*self._norms)

    def zero(self, name: str) -> None:
        """After `finish`: a parameter that no rank of this axis used has a gradient of zeros."""
        index = self._names.index(name)
        bucket, position = self._place[index]
        self._parameters[index].grad = bucket.current.views[position].zero_()

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for bucket in self._buckets:
            bucket.current.body.mul_(factor)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Take the hooks off; gradients are the module's own again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def reopen(self) -> None:
        """Put the hooks on again after `close`."""
        self._build()

    # Inside.

    def refresh(self) -> None:
        """Parameters that were frozen or thawed since the last step change the buckets, alike on all ranks."""
        if tuple(id(p) for _, p in self._named() if p.requires_grad) != self._signature:
            self._build()

    def _build(self, order: Sequence[int] | None = None) -> None:
        """Make hooks and buckets; `order` are indices into the parameters as their gradients arrive."""
        self.close()
        trainable = [(name, p) for name, p in self._named() if p.requires_grad]
        self._signature = tuple(id(p) for _, p in trainable)
        self._names = [name for name, _ in trainable]
        self._parameters = [p for _, p in trainable]
        self._arrivals = None if order is not None else []
        self._place = [None] * len(trainable)  # type: ignore[list-item]
        self._lay_out(order if order is not None else range(len(trainable))[::-1])
        self._hooks = [
            p.register_post_accumulate_grad_hook(functools.partial(self._arrived, i))
            for i, p in enumerate(self._parameters)
        ]
        if self._exchange is not None:
            self._exchange.arrange([bucket.described(self._names) for bucket in self._buckets])
        self._reset()

    def _lay_out(self, order: Sequence[int]) -> None:
        """Make the buckets, and say where each parameter's gradient lies in them."""
        ordered = [self._parameters[i] for i in order]
        groups = cut(
            [p.numel() * p.element_size() for p in ordered], [(p.dtype, p.device) for p in ordered], self._bucket_bytes
        )
        tail = self._slots * COLUMNS + len(ordered)
        zeros = self._axis.group.zeros if self._axis.group is not None else _zeros
        self._buckets = []
        for number, members in enumerate(groups):
            carries = number == len(groups) - 1 and ordered[members[0]].dtype in (torch.float32, torch.float64)
            bucket = Bucket([ordered[m] for m in members], [order[m] for m in members], tail if carries else 0, zeros)
            self._buckets.append(bucket)
            for position, member in enumerate(members):
                self._place[order[member]] = (bucket, position)
        if not groups or self._buckets[-1].current.tail.numel() == 0:
            device = self._parameters[0].device if self._parameters else torch.device("cpu")
            self._buckets.append(Bucket([], [], tail, zeros, torch.empty(0, device=device)))

    def _reset(self) -> None:
        self._used = [0] * len(self._parameters)
        self._held = [None] * len(self._parameters)
        self._reports = {}
        self._leaf = None
        self._next = 0
        self._begun = False
        self._moving = True
        self._sending = True
        for bucket in self._buckets:
            bucket.reset()

    def _arrived(self, index: int, parameter: nn.Parameter) -> None:
        """A gradient is complete: move it into its bucket, and send the bucket when it was the last one."""
        self._used[index] += 1
        if not self._moving:
            return
        bucket, position = self._place[index]
        if parameter.grad is not bucket.current.views[position]:
            self._move(index, bucket.current.views[position])
        if not self._sending:
            return
        if self._arrivals is not None:
            self._arrivals.append(index)
        bucket.missing -= 1
        if bucket.missing == 0:
            self._advance()
        elif bucket.missing < 0:
            raise JobError(
                f"the gradient of '{self._names[index]}' arrived again after it had been sent. Either backward ran "
                "twice without run.no_sync() around all but the last, or activation checkpointing is reentrant: "
                "use use_reentrant=False."
            )

    def _move(self, index: int, view: Tensor) -> None:
        """A parameter's gradient becomes `view`: what came, what was held, the sum of both, or zero."""
        parameter, held = self._parameters[index], self._held[index]
        grad = parameter.grad
        if grad is None:
            view.zero_() if held is None else view.copy_(held)
        elif grad.layout != torch.strided:
            raise JobError(
                f"the gradient of '{self._names[index]}' is sparse, which replicas cannot sum. "
                "Build its Embedding with sparse=False."
            )
        elif held is None:
            view.copy_(grad)
        else:
            torch.add(held, grad, out=view)
        parameter.grad = view
        self._held[index] = None

    def _complete(self, bucket: Bucket) -> None:
        """What the last microbatch did not use has not been moved yet; what none used counts as zero."""
        for index, view in zip(bucket.members, bucket.current.views, strict=True):
            if self._parameters[index].grad is not view:
                self._move(index, view)

    def _open_leaf(self, shard: int) -> None:
        """The gradients of `shard` go where those of its left sibling are, or else to a new leaf of the tree."""
        assert self._shards is not None
        if self._leaf == Node(shard - 1, shard) and shard % 2 == 1:
            self._leaf = Node(shard - 1, shard + 1)
            return
        if self._leaf is not None:
            for bucket in self._buckets:
                self._complete(bucket)
                bucket.close_leaf(self._leaf, self._shards)
                bucket.open_leaf()
            self.clear()
            self._begun = False
        self._leaf = Node(shard, shard + 1)

    def _advance(self) -> None:
        while self._next < len(self._buckets) and self._buckets[self._next].missing <= 0:
            bucket = self._buckets[self._next]
            self._next += 1
            self._send(bucket, last=self._next == len(self._buckets))

    def _send(self, bucket: Bucket, *, last: bool) -> None:
        self._complete(bucket)
        if self._shards is not None:
            self._close_tree(bucket)
        whole = bucket.nodes[0][1] if bucket.nodes else bucket.current
        if last:
            for _, buffer in bucket.nodes[1:]:
                buffer.tail.zero_()
            self._fill_tail(whole.tail)
        group = self._axis.group
        if group is None:
            return
        if self._tree is not None:
            bucket.work = self._tree.start([buffer.flat for _, buffer in bucket.nodes] or [whole.flat])
        elif self._exchange is not None:
            number = self._next - 1
            bucket.work = self._exchange.start(number, whole.flat, whole.body, whole.tail, mean=self._mean)
        else:
            bucket.work = group.all_reduce(whole.flat, dist.ReduceOp.AVG if self._mean else dist.ReduceOp.SUM)

    def _close_tree(self, bucket: Bucket) -> None:
        """Finish this rank's nodes; shards without samples are zeros."""
        assert self._shards is not None
        done = self._mine.start
        if self._leaf is not None:
            bucket.close_leaf(self._leaf, self._shards)
            done = self._leaf.stop
        for shard in range(done, self._mine.stop):
            bucket.zero_leaf(Node(shard, shard + 1), self._shards)
        expected = nodes(*self._mine, self._shards)
        assert [node for node, _ in bucket.nodes] == expected, (bucket.nodes, expected)
        if not bucket.nodes:
            bucket.current.flat.zero_()

    def _fill_tail(self, tail: Tensor) -> None:
        statistics.fill(tail[: self._slots * COLUMNS], self._reports)
        tail[self._slots * COLUMNS :] = torch.tensor(self._used, dtype=tail.dtype)

    def _read_tail(self) -> tuple[list[tuple[float, float]], list[float]]:
        row: list[float] = self._buckets[-1].current.tail.tolist()
        cut_at = self._slots * COLUMNS
        return statistics.decode(row[:cut_at]), row[cut_at:]

    def _hand_out(self, used: Sequence[float]) -> None:
        """`.grad` is the summed view for what any rank used, None for the rest."""
        for parameter, (bucket, position), count in zip(self._parameters, self._place, used, strict=True):
            view = bucket.current.views[position]
            parameter.grad = view if count else None
            if self._shards is not None and 0 < count < self._shards:
                view.add_(0.0)  # whether a zero was added or skipped on the way shows only in the sign of a zero
        if self._arrivals is not None:
            self._follow_arrivals()

    def _follow_arrivals(self) -> None:
        """Fill buckets from the next step on in the order in which rank 0's gradients arrived in this one."""
        order = list(dict.fromkeys(self._arrivals or []))
        order += [i for i in reversed(range(len(self._parameters))) if i not in set(order)]
        if self._axis.group is not None:
            agreed = torch.tensor(order, dtype=torch.int64, device=self._buckets[-1].current.flat.device)
            if order:
                self._axis.group.broadcast([agreed], root=0).wait()
            order = agreed.tolist()
        held = [p.grad for p in self._parameters]
        self._build(order)
        for parameter, grad, (bucket, position) in zip(self._parameters, held, self._place, strict=True):
            if grad is not None:
                parameter.grad = bucket.current.views[position].copy_(grad)
            else:
                bucket.current.views[position].zero_()


def _zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(numel, dtype=dtype, device=device)
