"""Whether an optimizer may be stepped one parameter at a time, or even one piece of it: found out by trying."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import JobError

STEPS, SIZE, RATE = 3, 8, 0.1


def works_on_pieces(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether it comes to the same on pieces of a parameter as on the whole: each element follows its own gradient.

    A twin with the options of each of the optimizer's groups steps on two small parameters. Raises JobError where
    already stepping them one after the other comes to something else, as of an optimizer that looks at all of them
    together.
    """
    return all([_in_group(optimizer, group, parameters) for group in optimizer.param_groups if group["params"]])


def _in_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> bool:
    dims = 2 if any(p.dim() > 1 for p in parameters) else 1
    try:
        together = _tried(optimizer, group, dims, lambda p: [[*p]])
        one_by_one = _tried(optimizer, group, dims, lambda p: [[each] for each in p])
        separable = all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(together, one_by_one, strict=True))
        why = "it comes to another result"
    except Exception as error:
        separable, why = False, f"it fails with {type(error).__name__}: {error}"
    if not separable:
        raise JobError(
            f"the optimizer {type(optimizer).__name__} cannot be stepped on one parameter after the other ({why}), "
            "which the plan's states, parameters or offload.optimizer need. Use one of torch.optim such as AdamW, "
            "or leave them out of the plan."
        )
    try:
        halves = _tried(optimizer, group, 1, lambda p: [[each] for each in p], cut=True)
        whole = _tried(optimizer, group, dims, lambda p: [[each] for each in p])
    except Exception:  # it wants matrices, say: then it gets whole parameters
        return False
    return all(torch.allclose(a.flatten(), b, rtol=1e-5, atol=1e-7) for a, b in zip(whole, halves, strict=True))


def _tried(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    dims: int,
    turns: Callable[[Sequence[nn.Parameter]], list[list[nn.Parameter]]],
    *,
    cut: bool = False,
) -> list[Tensor]:
    """Two parameters after a few steps, of which each step takes these in `turns`; `cut`: each as two halves."""
    draw = torch.Generator().manual_seed(5)
    shape = (SIZE, SIZE) if dims == 2 else (SIZE * SIZE,)
    starts = [torch.randn(SIZE * SIZE, generator=draw) for _ in range(2)]
    slopes = [[torch.randn(SIZE * SIZE, generator=draw) for _ in range(2)] for _ in range(STEPS)]
    parts = [part for start in starts for part in (start.chunk(2) if cut else [start.view(shape)])]
    parameters = [nn.Parameter(part.clone()) for part in parts]
    twin = _twin(optimizer, group)
    for step in slopes:
        given = [part for slope in step for part in (slope.chunk(2) if cut else [slope.view(shape)])]
        for p, gradient in zip(parameters, given, strict=True):
            p.grad = gradient.clone()
        for turn in turns(parameters):
            twin.param_groups[0]["params"] = turn
            twin.step()
    found = [p.detach() for p in parameters]
    return [torch.cat(found[:2]), torch.cat(found[2:])] if cut else found


def _twin(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The same optimizer with the options of one group, without parameters, hooks and what it remembers."""
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a scheduler binds it to the optimizer that it belongs to
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    options: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
    options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in options.items()}
    if "lr" in options:  # a warm-up may begin with next to nothing
        options["lr"] = torch.full_like(options["lr"], RATE) if isinstance(options["lr"], Tensor) else RATE
    twin.state = defaultdict(dict)
    twin.param_groups = [{**options, "params": []}]
    return twin
