"""Resume: put the newest whole checkpoint into a module and its optimizers, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from msgspec import Struct
from torch import nn

from shardwise.checkpoint.load import (
    compare,
    fill,
    needed_files,
    none_whole,
    report_damage,
    scalars_of,
    verify,
)
from shardwise.checkpoint.manifest import DamagedCheckpoint, Manifest, committed, read
from shardwise.checkpoint.state import Empty, OptimizerLoad, install_extra_state, module_tensors
from shardwise.checkpoint.store import Store
from shardwise.spec.plan import Plan


class Resumed(Struct, frozen=True):
    """What was loaded: the finished steps, the scalars given to `save`, and the checkpoint itself."""

    step: int
    scalars: dict[str, Any]
    manifest: Manifest


def restore(
    store: Store,
    manifest: Manifest,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    plan: Plan | None = None,
    rank: int = 0,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Load one checkpoint into the module's parameters in place, and into the optimizers; returns the scalars.

    Without `optimizers` only the model is loaded. `extra` are further tensors that were saved by their names.
    Raises CheckpointError when the checkpoint is of another model or other optimizers (nothing was changed), and
    DamagedCheckpoint when a file is not whole (nothing was changed).
    """
    attempt = _Restore(store, manifest, module, optimizers, plan or Plan(), rank, extra or {})
    attempt.check()
    return attempt.run()


def resume(
    store: Store,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    plan: Plan,
    rank: int,
    agree: Callable[[bool], bool] = lambda whole: whole,
    extra: Mapping[str, torch.Tensor] | None = None,
    empty: Empty | None = None,
) -> Resumed | None:
    """`restore` the newest checkpoint that is whole for every rank; None when the store has no checkpoint.

    All ranks call it together; `agree` returns whether all of them passed True (a minimum over the ranks), so that
    all take the same checkpoint. `empty` makes optimizer states that are as large as a parameter.
    Each newer one that is passed over is an event `checkpoint_damaged`. Raises
    CheckpointError when there are some and none is whole, or when one is of another model.
    """
    found = committed(store)
    for folder in found:
        damage = ""
        try:
            attempt = _Restore(store, read(store, folder), module, optimizers, plan, rank, extra or {}, empty)
            attempt.check()
        except DamagedCheckpoint as error:
            damage = str(error)
        if agree(not damage):
            return Resumed(attempt.manifest.step, attempt.run(), attempt.manifest)
        report_damage(store, folder, damage or "another rank found a damaged file.")
    if found:
        raise none_whole(store, found)
    return None


class _Restore:
    """One checkpoint on its way into a module: `check` changes nothing, `run` puts it in."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        plan: Plan,
        rank: int,
        extra: Mapping[str, torch.Tensor],
        empty: Empty | None = None,
    ) -> None:
        self.store, self.manifest, self.module, self.optimizers = store, manifest, module, optimizers
        self.plan, self.rank, self.extra, self.empty = plan, rank, extra, empty
        self._scalars: dict[str, Any] = {}
        self._wanted: dict[str, torch.Tensor] = {}
        self._state: OptimizerLoad | None = None

    def check(self) -> None:
        """Raises CheckpointError for another model or other optimizers, DamagedCheckpoint for a file not whole."""
        self._scalars = scalars_of(self.manifest)
        self._wanted = module_tensors(self.module) | dict(self.extra)
        # the model first: "another model" says more than "another optimizer"
        compare(self.store, self.manifest, self._wanted, self.plan, self.rank)
        if self.optimizers:
            self._state = OptimizerLoad(
                self.optimizers,
                self.module,
                self._scalars.get("optimizers"),
                self.manifest,
                self.plan,
                self.rank,
                self.empty,
            )
            self._wanted |= self._state.tensors
            compare(self.store, self.manifest, self._wanted, self.plan, self.rank)
        needed = needed_files(self.manifest, self._wanted, self.plan, self.rank)
        verify(self.store, self.manifest, needed)

    def run(self) -> dict[str, Any]:
        """Copy everything; returns the scalars."""
        fill(self.store, self.manifest, self._wanted, self.plan, self.rank)
        if self._state is not None:
            self._state.install()
        install_extra_state(self.module, self._scalars.get("extra_state", {}))
        return self._scalars
