"""What a replica does that is cut into stages: its steps, its evaluations, and what its ranks tell each other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shardwise.comm.collectives import broadcast_all, totals
from shardwise.comm.group import Group
from shardwise.comm.mesh import Mesh
from shardwise.models.dataflow import Forward, Loss
from shardwise.parallel.blame import shapes, user_code
from shardwise.parallel.flows import Flows, Route
from shardwise.parallel.pipeline import Micro, Pipeline, received, stages_of
from shardwise.parallel.stage import Stage
from shardwise.parallel.statistics import Totals
from shardwise.parallel.ties import Ties, kept, places_of
from shardwise.spec.layout import stage_rank, stages_with
from shardwise.spec.plan import Plan

if TYPE_CHECKING:
    from shardwise.parallel.parallelize import Replica

Head = Callable[[Any, Any, int], Tensor]  # (output, batch, microbatch) -> what backward begins with


class Pipelined:
    """The stages of one rank. Made before the module moves to its device: what others hold never gets there."""

    def __init__(self, module: nn.Module, plan: Plan, mesh: Mesh) -> None:
        axis = mesh.axis("pipeline")
        assert axis.group is not None
        self.group: Group = axis.group
        self.count = len(plan.stages)
        self.numbers = stages_of(axis.rank, plan)
        self.norm = 0.0
        self._module, self._plan, self._mesh = module, plan, mesh
        self.kept = frozenset(kept(module, plan, mesh.rank))
        self._stage = Stage(module, plan.blocks, self.kept, mesh.device)
        self._ties = Ties(module, plan, self.group)
        self._pipeline = Pipeline(
            module,
            self.numbers,
            self.count,
            self.group,
            mesh.device,
            schedule=plan.schedule,
            compute=self._compute,
            reduce=self._complete,
            gather=self._gather_units,
            span=mesh.timeline.span,
            kept=self._of_stage,
        )
        self._replica: Replica | None = None
        self._micros: list[Micro] = []
        self._streams: list[int] = []
        self._left: set[str] = set()  # parameters whose gradients are not complete
        self._head: Head | None = None
        self._forward: Forward | None = None
        self._flows: Flows | None = None

    def attach(self, replica: Replica) -> None:
        """The replica that these are the stages of."""
        self._replica = replica
        self._flows = Flows(
            replica.module, self._plan, self._bare, numbers=self.numbers, kept=self.kept, shapes=replica.shapes
        )

    def spread(self) -> None:
        """What several ranks of the pipeline hold is alike from now on. Collective."""
        self._ties.spread(self._module)

    def begin(self) -> None:
        """The module's parts are run stage by stage from now on."""
        self._stage.open()

    @property
    def last(self) -> bool:
        """Whether this rank has the last stage, and with it the outputs."""
        return self.count - 1 in self.numbers

    def train(
        self, batches: Sequence[Any], streams: Sequence[int], head: Head, loss: Loss, forward: Forward | None
    ) -> None:
        """Forward and backward of this step's microbatches; gradients are added up in `.grad`."""
        assert self._flows is not None
        mode = self._flows.mode()
        self._micros = [self._micro(batch, mode, forward, loss) for batch in batches]
        self._streams, self._head, self._forward = list(streams), head, forward
        self._left = {name for name, _ in self._attached().named()}
        self._pipeline.step(self._micros)
        self._attached().reducer.collect(self._left)
        self._micros = []

    def outputs(self, batches: Iterable[Any], forward: Forward | None) -> Iterator[tuple[Any, Any]]:
        """The module's output for each batch, and the batch, on the rank of the last stage; nothing elsewhere. Every
        rank of the pipeline goes through the same batches."""
        assert self._flows is not None
        self._forward, self._head = forward, None
        for batch in batches:
            micro = self._micro(batch, self._flows.mode(), forward, None)
            self._micros, self._streams = [micro], []
            found: Any = ()
            for number in self.numbers:
                found = self._compute(number, 0, self._arriving(number, micro.route, found))
                if number + 1 == self.count:
                    yield found, batch
                elif (target := stage_rank(number + 1, self._plan)) != self.group.rank():
                    for work in [self.group.send([tensor], target) for tensor in found]:
                        work.wait()
        self._micros = []

    def _arriving(self, number: int, route: Route, before: Sequence[Tensor]) -> Sequence[Tensor]:
        """What a stage takes in; `before` is what this rank's stage before it gave, which may be the one."""
        if number == 0:
            return ()
        source = stage_rank(number - 1, self._plan)
        if source == self.group.rank():
            return before
        came = received(route, number, self._mesh.device)
        for tensor in came:
            self.group.recv([tensor], source).wait()
        return [tensor.detach() for tensor in came]

    def settle(self, counted: Totals) -> Totals:
        """After the reducer has finished: sum the gradients of what several stages hold, take the norm of all of them,
        and tell everybody what the last stage's ranks counted. Collective over the pipeline."""
        replica = self._attached()
        self._ties.sum(dict(replica.named()), replica.reducer.zero)
        own = replica.own_norm(self._ties.elsewhere if self._ties.names else None)
        slots = replica.axis.size
        row = torch.zeros(4 + slots, dtype=torch.float64, device=self._mesh.device)
        said = [own * own, *((counted.loss_sum, counted.weight, replica.guess) if self.last else (0.0, 0.0, 0.0))]
        row[:4] = torch.tensor(said, dtype=torch.float64)
        if self.last:
            row[[4 + slot for slot in counted.bad]] = 1.0
        self.group.all_reduce(row).wait()
        square, loss_sum, weight, guess, *bad = row.tolist()
        self.norm = math.sqrt(square) if square >= 0 else square  # nan stays nan
        replica.settled(guess)
        return Totals(loss_sum, weight, [slot for slot, flag in enumerate(bad) if flag])

    def share(self, sums: Sequence[float]) -> list[float]:
        """What the last stage's rank has counted, on every rank of the pipeline. Collective."""
        return totals(list(sums) if self.last else [0.0] * len(sums), self.group, self._mesh.device)

    def gather(self) -> None:
        """Every rank of the pipeline takes what the others hold: the module is whole again. Collective."""
        by_place: dict[int, list[Tensor]] = {}
        for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers()):
            places = places_of(name, self._plan)
            if len(places) == self._plan.pipeline:
                continue
            if name not in self.kept:
                tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            by_place.setdefault(places[0], []).append(tensor)
        for place, tensors in sorted(by_place.items()):
            broadcast_all(tensors, self.group, root=place)
        self.kept = frozenset(name for name, _ in (*self._module.named_parameters(), *self._module.named_buffers()))

    def close(self) -> None:
        self._stage.close()

    def _micro(self, batch: Any, mode: Any, forward: Forward | None, loss: Loss | None) -> Micro:
        assert self._flows is not None
        about = user_code("the model", about=lambda: f"The batch was {shapes(batch)}.")
        with about, self._attached().formats.forward():
            return Micro(batch, self._flows.route(batch, mode, forward=forward, loss=loss))

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """The module as the user made it."""
        units = self._attached().units
        with self._stage.closed(), units.bare() if units else contextlib.nullcontext(), self._attached().quiet():
            yield

    def _compute(self, number: int, chunk: int, came: Sequence[Tensor]) -> Any:
        replica = self._attached()
        batch, route = self._micros[chunk]
        if self._streams:
            replica.seed(self._streams[chunk])
        with self._mesh.timeline.span("forward", number, chunk), replica.formats.forward():
            with user_code("the model", about=lambda: f"The batch was {shapes(batch)}."):
                # As they are, autocast would keep casts of them over microbatches that share a buffer.
                values = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in came]
                found = self._stage.run(route.flow, route.parts[number], batch, values, forward=self._forward)
            if number + 1 < self.count or self._head is None:
                return found
            return self._head(found, batch, chunk)

    def _of_stage(self, number: int) -> list[str]:
        return [name for name in self.kept if number in stages_with(f"model/{name}", self._plan)]

    def _complete(self, number: int) -> None:
        """All gradients of a stage are there, but for what another stage of this rank has too."""
        mine = {name for name in self._left if stages_with(f"model/{name}", self._plan) == [number]}
        self._left -= mine
        self._attached().reducer.collect(mine)

    def _gather_units(self) -> None:
        if (units := self._attached().units) is not None:
            units.open_all()

    def _attached(self) -> Replica:
        assert self._replica is not None
        return self._replica
