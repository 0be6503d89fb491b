"""What a job says of its optimizers, and the torch optimizers that it becomes."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shardwise.errors import JobError, did_you_mean
from shardwise.spec.job import Optimizer, Schedule, TrainJob

if TYPE_CHECKING:
    import torch


def adamw(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    warmup: int = 0,
    schedule: Schedule = "constant",
    final: float = 0.0,
    **more: Any,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with a warm-up of `warmup` steps, then `schedule` down to `final` x lr."""
    own = {name: more.pop(name) for name in ("params", "scaling", "base_batch") if name in more}
    options = {"betas": betas, "weight_decay": weight_decay, **more}
    return Optimizer(optimizer="AdamW", lr=lr, options=options, warmup=warmup, schedule=schedule, final=final, **own)


def sgd(
    lr: float = 0.1,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: Schedule = "constant",
    final: float = 0.0,
    **more: Any,
) -> Optimizer:
    """Stochastic gradient descent with momentum, with a warm-up of `warmup` steps, then `schedule`."""
    own = {name: more.pop(name) for name in ("params", "scaling", "base_batch") if name in more}
    options = {"momentum": momentum, "weight_decay": weight_decay, **more}
    return Optimizer(optimizer="SGD", lr=lr, options=options, warmup=warmup, schedule=schedule, final=final, **own)


def optimizer(kind: str | Callable[..., Any], *, lr: float, **more: Any) -> Optimizer:
    """Any `torch.optim` optimizer, by name or class; keyword arguments that `Optimizer` lacks go to it."""
    own = {k: more.pop(k) for k in ("params", "warmup", "schedule", "final", "scaling", "base_batch") if k in more}
    return Optimizer(optimizer=kind, lr=lr, options=more, **own)


class Optimizers:
    """The job's torch optimizers, each with its parameters and schedule; `schedule(step)` sets this step's rates."""

    def __init__(self, module: torch.nn.Module, job: TrainJob) -> None:
        self.job = job
        self.specs: list[Optimizer] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        left = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        for spec in job.optimizers:
            own = [(name, p) for name, p in left if fnmatch.fnmatchcase(name, spec.params)]
            if not own:
                raise JobError(
                    f"params='{spec.params}' of an optimizer of the job matches no trainable parameter that is left"
                    f"{did_you_mean(spec.params, [name for name, _ in left][:20])}"
                )
            taken = {name for name, _ in own}
            left = [(name, p) for name, p in left if name not in taken]
            self.specs.append(spec)
            self.optimizers.append(_build(spec, [p for _, p in own], job.global_batch))
        if left:
            raise JobError(
                f"no optimizer of the job takes the parameter '{left[0][0]}' and {len(left) - 1} more. "
                "Add an optimizer with params='*' at the end, or freeze them with requires_grad_(False)."
            )

    def schedule(self, step: int) -> float:
        """Set every optimizer's learning rate for `step` (0-based); returns the first one's."""
        for spec, each in zip(self.specs, self.optimizers, strict=True):
            if spec.schedule == "own":
                continue
            rate = self._rate(spec, step)
            for group in each.param_groups:
                group["lr"] = rate
        return float(self.optimizers[0].param_groups[0]["lr"])

    def rate(self, step: int) -> float:
        """The first one's rate in `step`, without setting it."""
        if self.specs[0].schedule == "own":
            return float(self.optimizers[0].param_groups[0]["lr"])
        return self._rate(self.specs[0], step)

    def _rate(self, spec: Optimizer, step: int) -> float:
        return spec.scaled_lr(self.job.global_batch) * spec.factor(step, self.job.steps)


def _build(spec: Optimizer, parameters: Sequence[torch.nn.Parameter], global_batch: int) -> torch.optim.Optimizer:
    import torch

    kind = spec.optimizer
    if isinstance(kind, str):
        known = [n for n, v in vars(torch.optim).items() if inspect.isclass(v) and issubclass(v, torch.optim.Optimizer)]
        if kind not in known:
            raise JobError(f"optimizer='{kind}' of the job is not in torch.optim{did_you_mean(kind, known)}")
        kind = getattr(torch.optim, kind)
    options = dict(spec.options)
    accepted = inspect.signature(kind).parameters
    if "fused" in accepted and "foreach" not in options and all(p.is_floating_point() for p in parameters):
        options.setdefault("fused", True)
    try:
        built = kind(parameters, lr=spec.scaled_lr(global_batch), **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(
            f"the optimizer {getattr(kind, '__name__', kind)} of the job refused its options: {error}."
        ) from None
    if not isinstance(built, torch.optim.Optimizer):
        raise JobError(
            f"the optimizer of the job returned a {type(built).__name__}; it must be a torch.optim.Optimizer."
        )
    return built
