"""Losses and metrics that weigh right: each returns `(sum, weight)`, both 0-dim tensors.

`sum` adds up the counted elements and `weight` says how many they are; whoever averages divides the sum of sums by the
sum of weights, so padding, uneven shards and accumulation do not change the mean. `output` is the module's output: a
tensor, or an object or mapping with `logits` as Hugging Face modules return. `batch` is a mapping with `targets` or
`labels`, or a tuple whose second element they are. Targets equal to IGNORE (-100) are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import JobError

IGNORE = -100
ROWS_AT_ONCE = 64  # logits of 64 positions stay in a core's cache while their loss and gradient are computed


def next_token_loss(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits [B, T, V], in nats a token.

    `targets` [B, T] are the next tokens, already shifted. `labels` [B, T] follow Hugging Face: they are the inputs
    themselves, and position t is compared with label t + 1. Raises JobError when the shapes do not match.
    """
    logits, targets = logits_of(output), targets_of(batch)
    if "targets" not in batch if isinstance(batch, Mapping) else False:
        targets = F.pad(targets[:, 1:], (0, 1), value=IGNORE)  # shifting labels copies less than shifting logits
    return _cross_entropy(logits, targets)


def cross_entropy(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of logits [N, C] or [N, T, C] with integer targets of the shape without C.

    Logits of four and more dimensions are [N, C, ...] with targets [N, ...], as torch has them for images.
    """
    return _cross_entropy(classes_last(logits_of(output)), targets_of(batch))


def mse(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Squared errors and the number of elements. An output [N, 1] fits targets [N]; nothing else is broadcast."""
    predicted, targets = logits_of(output), targets_of(batch)
    if predicted.shape != targets.shape and predicted.shape[-1:] == (1,):
        predicted = predicted.squeeze(-1)
    if predicted.shape != targets.shape:
        raise _mismatch("mse", predicted, targets)
    total = F.mse_loss(_at_least_float32(predicted), targets.to(torch.float32), reduction="sum")
    return total, total.new_tensor(float(targets.numel()))


def accuracy(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """How many targets are the class with the highest logit, and how many are counted; shapes as in cross_entropy."""
    logits, targets = classes_last(logits_of(output)), targets_of(batch)
    if logits.shape[:-1] != targets.shape:
        raise _mismatch("accuracy", logits, targets)
    counted = targets != IGNORE
    return ((logits.argmax(-1) == targets) & counted).sum(), counted.sum()


def logits_of(output: Any) -> Tensor:
    """The tensor in a module's output. Raises JobError when there is none."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise JobError(
            f"the loss needs a tensor but the model returned {type(output).__name__}. Return the tensor from forward, "
            "an object with .logits, or write a loss(output, batch) of your own that returns (sum, weight)."
        )
    return found


def targets_of(batch: Any) -> Tensor:
    """`targets`, else `labels`, of a mapping; the second element of a tuple. Raises JobError when there is neither."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch["targets"] if "targets" in batch else batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if isinstance(found, Tensor):
        return found
    has = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise JobError(
        f"the loss found no targets in the batch (it is {has}). Let the data give a mapping with a tensor 'targets' "
        "(or 'labels'), or a tuple (inputs, targets)."
    )


def classes_last(logits: Tensor) -> Tensor:
    """[N, C, d1, d2, ...] -> [N, d1, d2, ..., C]; two or three dimensions have their classes last already."""
    return logits.movedim(1, -1) if logits.ndim > 3 else logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[:-1] != targets.shape or targets.is_floating_point():
        raise _mismatch("cross-entropy", logits, targets)
    classes = logits.shape[-1]
    flat, wanted = logits.reshape(-1, classes), targets.reshape(-1).long()
    if _is_plain(wanted) and wanted.numel():
        _check_range(wanted, classes)
    weight = (wanted != IGNORE).sum()
    if _in_pieces(flat):
        piecewise: Callable[..., Tensor] = _PiecewiseCrossEntropy.apply
        return piecewise(flat, wanted), weight
    return F.cross_entropy(_at_least_float32(flat), wanted, ignore_index=IGNORE, reduction="sum"), weight


def _in_pieces(flat: Tensor) -> bool:
    # A GPU prefers one large kernel, and float16 gradients must be scaled before they are rounded.
    return _is_plain(flat) and flat.dtype != torch.float16


def _is_plain(x: Tensor) -> bool:
    """On the CPU, with numbers that may be looked at: not traced, faked or spread over ranks."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


class _PiecewiseCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits [N, C] whose gradient is computed with it, a few rows at a time in float32.

    Keeps one [N, C] tensor in the logits' own dtype for backward, where `F.cross_entropy` of bfloat16 logits keeps two
    in float32, and passes over memory once. The same numbers but for the order of summation.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        keep = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if keep else None
        counted = targets != IGNORE
        places = targets.clamp(min=0)[:, None]
        chosen = logits.new_empty((len(places), 1), dtype=_accumulator(logits))
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_p = torch.log_softmax(logits[rows], -1, dtype=chosen.dtype)
            torch.gather(log_p, 1, places[rows], out=chosen[rows])
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, places[rows], p.new_full((len(p), 1), -1.0))
                if not bool(counted[rows].all()):
                    p.mul_(counted[rows, None])
                gradient[rows] = p
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return -chosen[:, 0].masked_fill(~counted, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient if float(scale) == 1.0 else gradient * scale.to(gradient.dtype)), None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(_accumulator(x))


def _check_range(targets: Tensor, classes: int) -> None:
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if high >= classes or (low < 0 and bool(((targets < 0) & (targets != IGNORE)).any())):
        worst = high if high >= classes else low
        raise JobError(
            f"a target is {worst} but the model has {classes} classes, so targets must lie in 0..{classes - 1} "
            f"(or be {IGNORE}: not counted). Correct the data's targets or the model's number of classes."
        )


def _mismatch(name: str, output: Tensor, targets: Tensor) -> JobError:
    return JobError(
        f"{name} does not fit: the model returned {list(output.shape)} and the batch's targets are "
        f"{list(targets.shape)} of {str(targets.dtype).removeprefix('torch.')}. Make the model return one row of "
        "class scores for each integer target (mse: one number for each target)."
    )
