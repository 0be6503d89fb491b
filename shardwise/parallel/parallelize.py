"""`parallelize`: a plain module becomes one replica of a plan's data axis; its parameters and names stay its own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from shardwise.comm.collectives import broadcast_all, largest
from shardwise.comm.mesh import Axis, Mesh
from shardwise.errors import JobError, SpecError
from shardwise.parallel.activations import offloaded
from shardwise.parallel.allocator import keep_freed_memory
from shardwise.parallel.alone import Alone
from shardwise.parallel.batchnorm import BatchNormSync, batch_norms
from shardwise.parallel.coupling import UNKNOWN, agree
from shardwise.parallel.doubles import in_doubles
from shardwise.parallel.exact import ShardBuffers
from shardwise.parallel.parts import Part
from shardwise.parallel.precision import Formats, LossScaler
from shardwise.parallel.recompute import Recomputed, recomputing
from shardwise.parallel.reducer import Reducer
from shardwise.parallel.scatter import Scatter
from shardwise.parallel.sharded import built_by_rows, gathered, whole_at_rest
from shardwise.parallel.statistics import Totals
from shardwise.parallel.ties import kept
from shardwise.parallel.units import Units
from shardwise.parallel.updates import updates
from shardwise.parallel.words import synchroniser
from shardwise.plan.formats import refuse_host
from shardwise.plan.support import refuse_unbuilt
from shardwise.plan.synchronisations import refuse_together
from shardwise.spec.layout import holds
from shardwise.spec.plan import Plan

if TYPE_CHECKING:
    from shardwise.parallel.pipelined import Pipelined
    from shardwise.parallel.tensor.apply import Tensors


class Replica:
    """A module that obeys a plan on one rank. `module` is the user's own object; `fresh` until the first step agreed.

    Only `parallelize` makes one. `shapes` are those of the whole parameters. `guess` is the global weight of the last
    step, by which the loss is divided before backward; `state` and `load_state` keep it (and the float16 loss scale)
    over a checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: Mesh,
        *,
        coupled: Literal["refuse", "gather"],
        shards: int | None,
        norms: BatchNormSync | None,
        allow: Sequence[str],
        pipelined: Pipelined | None = None,
        units: Units | None = None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        recomputed: Recomputed | None = None,
        scratch: str | Path | None = None,
        tensors: Tensors | None = None,
    ) -> None:
        self.module = module
        self.plan = plan
        self.mesh = mesh
        self.axis = mesh.axis("batch")
        self.coupled = coupled
        self.shards = shards
        self.formats = Formats(plan.precision, mesh.device, doubles=in_doubles(module))
        wholes = [cut.whole for unit in (units.each if units is not None else ()) for cut in unit.cuts]
        self._offloaded = offloaded(module, plan, mesh.device, scratch, wholes)
        if self._offloaded is not None:
            self.formats.around = self._offloaded.around
        self.scaler = LossScaler() if plan.precision == "float16" else None
        self.guess = 1.0
        self.fresh = True
        self._guessed = False
        self._norms = norms
        self.units = units
        self.shapes = shapes or {}
        self._recomputed = recomputed
        self.tensors = tensors
        self.pipelined = pipelined
        if pipelined is not None:
            pipelined.attach(self)
        self._buffers = ShardBuffers(module, self.axis) if shards else None
        part = Part(plan, mesh, self.shapes, tensors.owned if tensors is not None else ())
        self.updates = updates(module, self.named(), plan, scratch, part)
        self.synchroniser = synchroniser(
            self.named, mesh, plan.sync, shards=shards, allow=allow, tables=_sparse_embeddings(module), units=units
        )
        self.synchroniser.updates = self.updates
        self._watch: Any = None

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this rank has."""
        every = self.module.named_parameters()
        return [(name, p) for name, p in every if self.pipelined is None or name in self.pipelined.kept]

    def buffers(self) -> list[torch.Tensor]:
        """The buffers that this rank has."""
        every = self.module.named_buffers()
        return [buffer for name, buffer in every if self.pipelined is None or name in self.pipelined.kept]

    @property
    def has_outputs(self) -> bool:
        """Whether this rank computes the module's outputs, and the loss."""
        return self.pipelined is None or self.pipelined.last

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Around forward passes that are no step's. Collective."""
        return self.units.working() if self.units is not None else contextlib.nullcontext()

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Around a step's forward passes: in the first one it is seen how parameters are read."""
        return self.units.watching() if self.units is not None and self.fresh else contextlib.nullcontext()

    def gather(self) -> None:
        """Every rank has the whole module, to keep. Collective."""
        if self.units is not None:
            self.units.dissolve()
        self.updates.gather()
        if self.pipelined is not None:
            self.pipelined.gather()
        if self.tensors is not None:
            self.tensors.gather()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Around a forward that no other rank takes part in, of the module as it was."""
        with contextlib.ExitStack() as stack:
            for part in (self._recomputed, self._norms):
                if part is not None:
                    stack.enter_context(part.paused())
            yield

    @property
    def reducer(self) -> Reducer | Scatter | Alone:
        """What the gradients of the coming step go through."""
        return self.synchroniser.reducer

    @property
    def speaks_for(self) -> int:
        """How many replicas the coming step's totals stand for: all, where they are this rank's own."""
        return self.axis.size if self.synchroniser.own_totals else 1

    @property
    def divisor(self) -> float:
        """What the loss is divided by before backward: the guess, or a share of it where totals are this rank's own."""
        return self.guess / self.speaks_for

    # The phases of a step, in the order in which `step` calls them.

    def begin(self, micros: int) -> None:
        for axis in ("data", "shard", "pipeline", "tensor"):
            if (group := self.mesh.axis(axis).group) is not None:
                group.step += 1
        self.reducer.begin()
        if self.units is not None:
            self.units.open()
        if self._buffers is not None:
            self._buffers.begin()
        if self._norms is not None:
            self._norms.begin(micros)
            if (self.coupled == "gather" or self.pipelined is not None) and self._norms.ragged:
                what = "coupled='gather'" if self.coupled == "gather" else "a pipeline"
                raise JobError(
                    f"{what} with batch_norm='sync' needs as many microbatches on every rank. Choose a "
                    "global_batch that the ranks divide, or batch_norm='local'."
                )

    def before_forward(self, index: int, shard: int | None) -> None:
        if self._buffers is not None:
            self._buffers.before_forward()
        if self._norms is not None:
            self._norms.begin_micro(index)

    def after_forward(self, shard: int | None) -> None:
        if self._buffers is not None:
            self._buffers.after_forward(shard)

    def after_backward(self, index: int) -> None:
        self.synchroniser.after_backward()
        if self._norms is not None:
            self._norms.end_micro(index)

    def stand_in(self, done: int, loss: Callable[[Any, Any], Any]) -> None:
        """A rank with fewer microbatches than others takes part in what they do together."""
        agreement = agree(self, loss, verdict=UNKNOWN, guess=0.0) if self.fresh and self.has_outputs else None
        if self._norms is not None:
            self._norms.stand_in(done)
        if agreement is not None:
            agreement.settle()

    def end_step(self) -> None:
        if self._buffers is not None:
            self._buffers.end()

    # What a step needs to know.

    def slot(self, shard: int | None) -> int:
        """Where this rank's loss and weight are counted: by shard in exact mode, by rank else."""
        return shard if self.shards is not None and shard is not None else self.axis.rank

    def scale(self, scaler: LossScaler | None) -> float:
        """What the loss sum is multiplied with before backward."""
        return (scaler.scale if scaler is not None else 1.0) / self.divisor

    def weigh(self, totals: Totals) -> float:
        """The weight of the whole step: the next one's guess, unless `totals` are this rank's own."""
        if totals.weight > 0 and not totals.bad and not self.synchroniser.own_totals:
            self.guess = totals.weight
        return totals.weight * self.speaks_for

    def norm(self) -> float:
        """The 2-norm of the whole gradient before it is normalised."""
        return self.pipelined.norm if self.pipelined is not None else self.own_norm()

    def own_norm(self, elsewhere: Collection[str] | None = None) -> float:
        """That of this rank's stages, without what counts elsewhere."""
        if self.tensors is not None:
            return self.tensors.norm(self.reducer, elsewhere or ())
        return self.reducer.norm(elsewhere) if elsewhere is not None else self.reducer.norm()

    def settled(self, guess: float) -> None:
        """The last stage's ranks have agreed on the first guess of the global weight."""
        self.guess, self._guessed, self.fresh = guess, True, False

    def settle_guess(self, weight: float) -> None:
        """The first guess of the global weight: `weight` is rank 0's share of it, or shard 0's in exact mode, or all of
        it when losses are gathered. A loaded guess is kept."""
        if not self._guessed and weight > 0:
            self.guess = weight * (1 if self.coupled == "gather" else self.shards or self.axis.size)
        self._guessed = True

    @staticmethod
    def seed(stream: int) -> None:
        """Start the random stream of one microbatch: torch's generators on every device, and Python's."""
        _seeder()(stream)
        random.seed(stream)

    # State.

    def state(self) -> dict[str, float | int]:
        """JSON scalars that a checkpoint must keep for the next step to be the same."""
        found: dict[str, float | int] = {"guess": self.guess, **self.updates.state()}
        if self.scaler is not None:
            found |= {"loss_scale": self.scaler.scale, "good_steps": self.scaler.good_steps}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, on whatever number of ranks."""
        self.guess = float(state.get("guess", self.guess))
        self._guessed = "guess" in state
        self.updates.load_state(state)
        if self.scaler is not None and "loss_scale" in state:
            self.scaler.scale, self.scaler.good_steps = float(state["loss_scale"]), int(state["good_steps"])

    def sync_buffers(self) -> None:
        """Every rank takes rank 0's buffers (running statistics). Collective; `evaluate` and whoever saves call it."""
        buffers = self.buffers()
        if self.axis.group is not None and buffers:
            broadcast_all(buffers, self.axis.group)

    # Loops that call backward themselves.

    def synchronise(self) -> float:
        """After the user's own `loss.backward()`, before `optimizer.step()`: average gradients over ranks.

        Collective. Returns the seconds spent waiting. Backward passes outside `no_sync` send as they run, so between
        two calls only the last one may be outside of it.
        """
        self._watch_forward()
        return self.reducer.finish(mean=True)[1]

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Backward passes in this block accumulate on this rank only."""
        self._watch_forward()
        return self.reducer.no_sync()

    def _watch_forward(self) -> None:
        """In such a loop nothing else tells that parameters were frozen or thawed since the last step."""
        if self._watch is None and isinstance(self.reducer, Reducer):
            reducer = self.reducer
            self._watch = self.module.register_forward_pre_hook(lambda module, args: reducer.refresh())

    def close(self) -> None:
        """Leave the module as an ordinary one: no hooks, batch norms as they were, gradients None."""
        self.synchroniser.close()
        self.updates.close()
        if self._offloaded is not None:
            self._offloaded.close()
        if self.pipelined is not None:
            self.pipelined.close()
        if self.units is not None:
            self.units.unwrap()
        if self._recomputed is not None:
            self._recomputed.close()
        if self.tensors is not None:
            self.tensors.close()
        if self._norms is not None:
            self._norms.close()
        if self._watch is not None:
            self._watch.remove()


def parallelize(
    module: nn.Module,
    plan: Plan,
    mesh: Mesh,
    *,
    batch_norm: Literal["sync", "local"] = "sync",
    coupled: Literal["refuse", "gather"] = "refuse",
    compile: bool = False,
    logical_shards: int = 4,
    allow: Sequence[str] = (),
    scratch: str | Path | None = None,
    by_part: bool = False,
) -> Replica:
    """Make `module` a replica on this rank: moved to the mesh's device, with the first replica's values, in place.
    With a pipeline it has the parameters of this rank's stages alone. Collective.

    `logical_shards` is the number of shards of the global batch in exact mode; `allow` names the words
    that `sync=auto` may choose; `scratch` is a folder on the disk that `offload` may use. `by_part`: the module has
    values only where this rank's part of it is. Raises SpecError for what the plan asks and this version cannot do,
    JobError when the ranks built different modules.
    """
    refuse_unbuilt(plan)
    refuse_host(plan, mesh.device.type)
    norms = batch_norms(module)
    _refuse_combinations(plan, list(norms), batch_norm, coupled, compile=compile)
    _refuse_with_pipeline(module, plan, coupled, compile=compile)
    _refuse_with_tensor(plan, compile=compile)
    pipelined = _pipelined(module, plan, mesh) if plan.pipeline > 1 else None
    _refuse_unlike(module, mesh, by_part=by_part)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    tensors = _tensors(module, plan, mesh) if by_part else None
    _place(module, plan, mesh)
    _spread(module, plan, mesh, mesh.axis("data" if by_part and built_by_rows(plan) else "batch"), tensors)
    sync = _synchronised(norms, plan, mesh) if batch_norm == "sync" and plan.replicas > 1 else None
    tensors = tensors or _tensors(module, plan, mesh)
    recomputed = recomputing(module, plan, synced_norms=sync is not None, compile=compile)
    if pipelined is not None:
        pipelined.spread()
    units = gathered(module, kept(module, plan, mesh.rank), mesh) if not whole_at_rest(plan) else None
    if pipelined is not None:
        pipelined.begin()
    if compile:
        module.compile()
    return Replica(
        module,
        plan,
        mesh,
        coupled=coupled,
        shards=logical_shards if plan.exact else None,
        norms=sync,
        allow=allow,
        pipelined=pipelined,
        units=units,
        shapes=shapes,
        recomputed=recomputed,
        scratch=scratch,
        tensors=tensors,
    )


def _synchronised(norms: dict[str, Any], plan: Plan, mesh: Mesh) -> BatchNormSync | None:
    """Statistics over all replicas, of the batch norms that this rank has."""
    if not norms:
        return None
    second = mesh.second_group("batch")
    assert second is not None
    here = {name: norm for name, norm in norms.items() if holds(f"model/{name}.weight", plan, mesh.rank)}
    return BatchNormSync(here, second, mesh.device)


def _spread(module: nn.Module, plan: Plan, mesh: Mesh, alike: Axis, tensors: Tensors | None) -> None:
    """The first rank's values, on the tensor axis (of what is not cut already) and on the one whose ranks hold what is
    `alike`. Collective."""
    held, cut = _held(module, plan, mesh.rank), tensors.owned if tensors is not None else {}
    for group, names in ((mesh.axis("tensor").group, held.keys() - cut.keys()), (alike.group, held.keys())):
        if group is not None:
            broadcast_all([held[name] for name in held if name in names], group)


def _tensors(module: nn.Module, plan: Plan, mesh: Mesh) -> Tensors | None:
    """The module cut over the tensor axis: what is whole once its values are alike, what is in parts before that."""
    if plan.tensor == 1:
        return None
    from shardwise.parallel.tensor.apply import Tensors  # what reads graphs takes a second to import

    return Tensors(module, plan, mesh)


def _pipelined(module: nn.Module, plan: Plan, mesh: Mesh) -> Pipelined:
    from shardwise.parallel.pipelined import Pipelined  # torch's pipelining takes a second to import

    return Pipelined(module, plan, mesh)


def _place(module: nn.Module, plan: Plan, mesh: Mesh) -> None:
    """On the device, in the plan's format, and this process ready to compute there."""
    if mesh.device.type == "cpu":
        keep_freed_memory()
    _move(module, kept(module, plan, mesh.rank), mesh.device, torch.float64 if plan.precision == "float64" else None)
    if plan.exact:
        torch.set_num_threads(1)


def _move(module: nn.Module, names: Collection[str], device: torch.device, dtype: torch.dtype | None) -> None:
    """Give the module the device, and floats the dtype; what is not called by `names` takes no memory there."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    if len(names) == len(tensors):
        module.to(device)
        if dtype is not None:
            module.to(dtype)
        return
    from shardwise.parallel.stage import stand_in

    for name, tensor in tensors.items():
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(device, kind) if name in names else stand_in(tensor.shape, kind, device)


def _held(module: nn.Module, plan: Plan, rank: int) -> dict[str, torch.Tensor]:
    names = set(kept(module, plan, rank))
    return {name: t for name, t in (*module.named_parameters(), *module.named_buffers()) if name in names}


def _sparse_embeddings(module: nn.Module) -> list[str]:
    """The parameters whose gradients have only the rows that were looked up."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    sparse = {id(part.weight) for part in module.modules() if isinstance(part, kinds) and part.sparse}
    return [name for name, p in module.named_parameters() if id(p) in sparse]


def _refuse_combinations(plan: Plan, norms: Sequence[str], batch_norm: str, coupled: str, *, compile: bool) -> None:
    if plan.exact and batch_norm == "sync" and norms:
        raise SpecError(
            f"exact=True cannot synchronise batch norms ({', '.join(list(norms)[:3])}): their sums over ranks are in "
            "no fixed order. Use batch_norm='local', or a norm over features such as GroupNorm."
        )
    if plan.replicas > 1 and norms and batch_norm == "sync":
        refuse_together(plan, "batch_norm", "batch_norm='sync'")
    if plan.replicas > 1 and coupled == "gather":
        refuse_together(plan, "coupled", "coupled='gather'")
    if plan.shard > 1 and plan.zero > 1 and coupled == "gather":
        raise SpecError(f"coupled='gather' does not go with zero={plan.zero} yet. Use zero=1, or the data axis alone.")
    if not whole_at_rest(plan) and compile:
        raise SpecError("compile=True does not go with zero=3 yet. Leave it out, or use zero=2.")


def _refuse_with_pipeline(module: nn.Module, plan: Plan, coupled: str, *, compile: bool) -> None:
    if plan.pipeline == 1:
        return
    if not plan.stages:
        raise SpecError(
            f"the plan {plan} does not say where to cut the model. Let sw.plan or sw.session make it, or give its "
            "blocks and stages."
        )
    if coupled == "gather":
        raise SpecError(f"coupled='gather' does not go with pipeline={plan.pipeline} yet. Use the data axis alone.")
    if compile:
        raise SpecError(f"compile=True does not go with pipeline={plan.pipeline} yet. Leave it out.")
    if any(name.startswith("_orig_mod.") or "._orig_mod." in name for name, _ in module.named_parameters()):
        raise SpecError(
            f"the model is compiled (torch.compile), which does not go with pipeline={plan.pipeline} yet. Build it "
            "without."
        )


def _refuse_with_tensor(plan: Plan, *, compile: bool) -> None:
    if plan.tensor == 1:
        return
    if not plan.splits:
        raise SpecError(
            f"the plan {plan} does not say what its tensor axis splits. Let sw.plan or sw.session find it, or give its "
            "splits."
        )
    if compile:
        raise SpecError(f"compile=True does not go with tensor={plan.tensor} yet. Leave it out.")


def _refuse_unlike(module: nn.Module, mesh: Mesh, *, by_part: bool) -> None:
    """Raise JobError on every rank when names, shapes or dtypes of the modules differ."""
    axes = [mesh.axis(name) for name in ("batch", "pipeline", "tensor")]
    groups = [axis.group for axis in axes if axis.group is not None]
    if not groups:
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    described = "\n".join(f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors) + f"{by_part}"
    number = float(int.from_bytes(hashlib.sha256(described.encode()).digest()[:6], "little"))
    for group in groups:
        most, least = largest([number, -number], group, mesh.device)
        if most != -least:
            raise JobError(
                f"model of the job builds different modules on different ranks (rank {mesh.rank}: {len(tensors)} "
                "tensors). Let its shapes depend on the job's parameters only, not on the rank or on chance."
            )


@functools.cache
def _seeder() -> Callable[[int], object]:
    """Without an accelerator `torch.manual_seed` costs half a millisecond and keeps a stack trace for each call."""
    return torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
