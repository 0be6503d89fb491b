"""`TrainJob`: what the user wants trained. It holds callables and is never saved itself; its function's source is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from msgspec import Struct, field

from shardwise.errors import SpecError
from shardwise.spec.plan import Precision

Schedule = Literal["constant", "cosine", "linear", "own"]


class Optimizer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `torch.optim` optimizer (its name, or a callable `params -> Optimizer`) with its learning-rate schedule.

    `params` is a glob over parameter names (`*.bias`); of several optimizers in one job each takes what the ones
    before it left. `scaling` changes `lr` with the global batch: linear (Goyal et al. 2017, section 2.1) or square
    root (Krizhevsky 2014), relative to `base_batch`. `warmup` is in steps. `schedule="own"`: the user sets the rates.
    """

    optimizer: str | Callable[..., Any]
    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    params: str = "*"
    warmup: int = 0
    schedule: Schedule = "constant"
    final: float = 0.0
    scaling: Literal["none", "linear", "sqrt"] = "none"
    base_batch: int = 0

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise SpecError(f"lr={self.lr} of the optimizer: it cannot be negative.")
        if self.warmup < 0:
            raise SpecError(f"warmup={self.warmup} of the optimizer: it is a number of steps and cannot be negative.")
        if self.scaling != "none" and self.base_batch < 1:
            raise SpecError(
                f"scaling='{self.scaling}' of the optimizer needs base_batch, the global batch that lr was chosen for."
            )

    def factor(self, step: int, steps: int) -> float:
        """What `lr` is multiplied with in `step` (0-based) of `steps`: linear warm-up, then down to `final`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        import math

        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.final + (1 - self.final) * shape

    def scaled_lr(self, global_batch: int) -> float:
        """`lr` for this global batch under the chosen scaling rule."""
        ratio = global_batch / self.base_batch if self.scaling != "none" else 1.0
        return self.lr * (ratio if self.scaling == "linear" else ratio**0.5)


class EarlyStop(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Stop when `metric` of the evaluation has not improved for `patience` evaluations."""

    metric: str = "loss"
    patience: int = 3
    better: Literal["lower", "higher"] = "lower"


class TrainJob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training job.

    `model()` builds the module. `loss(output, batch)` and every metric return `(sum, weight)`: the sum over the
    counted elements and how many there are, so that padding, uneven shards and accumulation weigh right.
    The module is called with what its `forward` asks for by name when a batch is a mapping, with the first element
    of a tuple, or with the batch itself; `forward(model, batch)` overrides that.
    """

    model: Callable[[], Any]
    loss: Callable[[Any, Any], tuple[Any, Any]]
    data: Any
    optimizer: Optimizer | tuple[Optimizer, ...]
    global_batch: int
    steps: int
    seed: int = 0
    forward: Callable[[Any, Any], Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any], tuple[Any, Any]]] = field(default_factory=dict)
    eval_every: int = 0
    save_every: int = 100
    keep_last: int = 2
    early_stop: EarlyStop | None = None
    clip_norm: float | None = None
    precision: Precision = "float32"
    compile: bool = False
    batch_norm: Literal["sync", "local"] = "sync"
    coupled: Literal["refuse", "gather"] = "refuse"
    on_nan: Literal["stop", "skip"] = "stop"
    logical_shards: int = 4
    workers: int = 0
    callbacks: tuple[Callable[..., None], ...] = ()
    log: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    small: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("global_batch", "steps", "logical_shards"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SpecError(f"{name}={value!r} of the job: it must be a whole number of at least 1.")
        for name in ("model", "loss"):
            if not callable(getattr(self, name)):
                raise SpecError(f"{name} of the job is {getattr(self, name)!r}; it must be a function.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise SpecError(f"clip_norm={self.clip_norm} of the job: it must be above 0, or None for no clipping.")

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        return self.optimizer if isinstance(self.optimizer, tuple) else (self.optimizer,)


class JobFacts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the planner needs of a job, without its callables: it crosses processes and is saved in the run folder."""

    global_batch: int
    steps: int
    precision: Precision = "float32"
    allow: tuple[str, ...] = ()
    state_bytes_per_parameter: int = 8
    logical_shards: int = 4
