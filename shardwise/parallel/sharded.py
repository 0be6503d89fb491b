"""The shard axis of a plan: optimizer states (zero=1), also gradients (2), also parameters (3) cut by rows over ranks.

ZeRO (Rajbhandari et al. 2020).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from shardwise.comm.collectives import totals
from shardwise.comm.group import Group
from shardwise.comm.mesh import Mesh
from shardwise.errors import JobError
from shardwise.parallel.reducer import Named, Reducer
from shardwise.parallel.rows import Cut, Rows
from shardwise.parallel.scatter import Scatter
from shardwise.parallel.synchronise import Optimizers, Synchroniser
from shardwise.parallel.units import Units, places_of
from shardwise.parallel.updates import shrinks
from shardwise.spec.layout import has_master_rows
from shardwise.spec.plan import Plan


def whole_at_rest(plan: Plan) -> bool:
    """Whether every rank has whole parameters between steps."""
    return plan.shard == 1 or plan.zero < 3


def built_by_rows(plan: Plan) -> bool:
    """Whether a rank builds its rows alone; a tensor axis cuts before rows are taken, and cuts what is whole."""
    return not whole_at_rest(plan) and plan.tensor == 1


def gathered(module: nn.Module, names: Sequence[str], mesh: Mesh) -> Units:
    """The parameters called `names` are this rank's rows from now on, and whole while they compute."""
    group = mesh.axis("shard").group
    assert group is not None
    places = places_of(module, names)
    cuts, small = [], shrinks(module, mesh.plan)
    for name, p in module.named_parameters():
        if name in places and p.dim():
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise JobError(
                    f"'{name}' has a hook on its gradient, which zero=3 would not call: there the gradient is another "
                    "tensor's. Take the hook off, or use zero=2."
                )
            dtype = torch.bfloat16 if id(p) in small else p.dtype
            whole = nn.Parameter(torch.empty(p.shape, dtype=dtype, device=p.device), p.requires_grad)
            cuts.append(Cut(name, whole, p, places[name]))
    return Units(module, cuts, group)


class ShardedUpdates(Synchroniser):
    """Gradients summed over all replicas; each rank updates its rows of the parameters.

    With zero=1 gradients are summed as on the data axis. With zero=2 they are summed by rows; so they are with zero=3,
    where the parameters are rows too (`units`). A pipeline's stages keep whole gradients until the end of a step, so
    that zero=2 is zero=1 there.
    """

    def __init__(self, named: Callable[[], Named], mesh: Mesh, units: Units | None) -> None:
        plan, group = mesh.plan, mesh.axis("shard").group
        assert group is not None
        self._named, self._group, self._units = named, group, units
        self._whole, self._plan = units is None, plan
        self._known: set[int] = set()  # optimizers that may update by rows
        self._device = mesh.device
        self._scatter: Scatter | None = None
        by_rows = units is not None or (plan.zero == 2 and plan.pipeline == 1)
        batch = mesh.axis("batch")
        super().__init__(named, batch._replace(size=1) if by_rows else batch, plan.sync)
        if by_rows:
            own = [cut for unit in (units.each if units else ()) for cut in unit.cuts]
            cuts = own or [Cut(name, p, p) for name, p in named() if p.dim()]
            self._scatter = Scatter(cuts, [(name, p) for name, p in named() if not p.dim()], mesh, units)

    @property
    def reducer(self) -> Reducer | Scatter:
        found = self._scatter or self._reducer
        assert isinstance(found, Reducer | Scatter)
        return found

    def after_backward(self) -> None:
        if self._scatter is not None:
            self._scatter.end_micro()

    def finish_step(self, optimizers: Optimizers, *, skipped: bool) -> float:
        for each in optimizers:
            if id(each) not in self._known:
                refuse_unlike_by_rows(each, self._group, self._device)
                self._cut_states(each)
                self._known.add(id(each))
        if skipped:
            return 0.0
        if not self._whole:
            return super().finish_step(optimizers, skipped=False)
        with self._by_rows():
            super().finish_step(optimizers, skipped=False)
        self._spread()
        return 0.0

    def _cut_states(self, optimizer: torch.optim.Optimizer) -> None:
        """States that the optimizer made when it was built are as long as whole parameters."""
        cuts = {id(cut.own): cut.whole for unit in (self._units.each if self._units else ()) for cut in unit.cuts}
        for p, state in optimizer.state.items():
            whole = cuts.get(id(p), p)
            if whole.dim():
                rows = Rows([whole.shape], self._group.size())
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == whole.shape:
                        state[key] = rows.own(0, value, self._group.rank()).clone()

    @contextlib.contextmanager
    def _by_rows(self) -> Iterator[None]:
        """In this block parameters and gradients are this rank's rows: views of the whole."""
        rank, cut = self._group.rank(), [(name, p) for name, p in self._named() if p.dim()]
        rows, wholes = Rows([p.shape for _, p in cut], self._group.size()), [p.data for _, p in cut]
        for index, (name, p) in enumerate(cut):
            grad = self._gradient(index, name, p, rows)
            p.grad = None
            p.data = rows.own(index, wholes[index], rank)
            p.grad = grad
        try:
            yield
        finally:
            for (_, p), whole in zip(cut, wholes, strict=True):
                p.grad = None
                p.data = whole

    def _gradient(self, index: int, name: str, p: nn.Parameter, rows: Rows) -> Tensor | None:
        if self._scatter is not None:
            return self._scatter.rows.get(name)
        return None if p.grad is None else rows.own(index, p.grad, self._group.rank())

    def loaded(self) -> None:
        if self._whole and has_master_rows(self._plan):
            self._spread(frozen=True)

    def _spread(self, *, frozen: bool = False) -> None:
        """Every rank takes the rows that the others have updated, one parameter dtype after the other."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for _, p in self._named():
            if (p.requires_grad or frozen) and p.dim():
                kinds.setdefault(p.dtype, []).append(p.data)
        for tensors in kinds.values():
            rows = Rows([t.shape for t in tensors], self._group.size())
            piece = tensors[0].new_zeros(rows.size)
            rows.pack_own([rows.own(i, t, self._group.rank()) for i, t in enumerate(tensors)], piece)
            packed = piece.new_empty(rows.size * self._group.size())
            self._group.all_gather_single(packed, piece).wait()
            rows.unpack(packed, tensors)


def refuse_unlike_by_rows(optimizer: torch.optim.Optimizer, group: Group, device: torch.device) -> None:
    """Raise JobError on every rank unless the optimizer updates a parameter's rows as it would the whole: it is tried
    on a small one. (Adafactor, Muon and LBFGS look at all of a parameter.) Collective."""
    if totals([0.0 if _works_by_rows(optimizer) else 1.0], group, device)[0]:
        kind = type(optimizer).__name__
        raise JobError(
            f"the optimizer {kind} does not update a part of a parameter as it updates the whole, so it cannot be "
            "sharded or split. Use the data axis in the place of shard and tensor, or an elementwise optimizer such as "
            "AdamW or SGD."
        )


def _works_by_rows(optimizer: torch.optim.Optimizer) -> bool:
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    grads = [torch.linspace(-2, 3, 12, dtype=torch.float64).view(4, 3).roll(turn).square() for turn in (1, 5)]
    asked = inspect.signature(type(optimizer)).parameters  # what defaults hold beyond them is the class's own
    known = {key: optimizer.param_groups[0][key] for key in optimizer.defaults if key in asked}
    known |= {"lr": 0.1} if "lr" in known else {}  # which a warm-up may begin at zero
    try:
        found = []
        for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
            own = [nn.Parameter(start[part].clone()) for part in parts]
            for p, part in zip(own, parts, strict=True):
                one = type(optimizer)([p], **known)
                for grad in grads:
                    p.grad = grad[part].clone()
                    one.step()
            found.append(torch.cat([p.detach() for p in own]))
    except Exception:  # whatever an unknown optimizer wants, it cannot be tried
        return False
    return torch.allclose(found[0], found[1], rtol=1e-12, atol=0)
