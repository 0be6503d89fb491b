"""What a plan keeps in memory in which format: the bytes of it, and which formats and places go together."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.errors import SpecError
from shardwise.plan.synchronisations import name
from shardwise.spec.plan import Plan
from shardwise.spec.profile import BlockProfile, ModelProfile

STATE_WIDTH = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.25 + 1 / 256}  # of float32; int8 with a scale for 256 of them
AROUND = ("before", "after", "model")  # what a profile calls the parts that are no repeated blocks
AWAY = ("host", "disk")


def updates_in_pieces(plan: Plan) -> bool:
    """Whether parameters are updated piece by piece, their states in another format or in another place."""
    return plan.parameters != "float32" or plan.states != "float32" or plan.offload.optimizer != "none"


def refuse_formats(plan: Plan) -> None:
    """Raise SpecError for a format or place in the plan that cannot be, or that nothing has shown with the rest."""
    if plan.recompute.mode == "blocks" and not plan.recompute.blocks:
        raise SpecError("recompute=blocks in the plan needs their numbers, such as recompute.blocks=0+2.")
    if plan.master == "none" and plan.parameters != "bfloat16":
        raise SpecError("master=none in the plan is for parameters=bfloat16: others are their own masters.")
    if plan.parameters == "bfloat16" and plan.precision != "bfloat16":
        raise SpecError(
            f"parameters=bfloat16 in the plan needs precision=bfloat16, not {plan.precision}: what meets them is "
            "computed in that format."
        )
    if plan.states != "float32" and plan.precision == "float64":
        raise SpecError(f"states={plan.states} does not go with precision=float64. Leave one of them out.")
    if updates_in_pieces(plan):
        _refuse_with_pieces(plan, _said(plan))


def _refuse_with_pieces(plan: Plan, said: str) -> None:
    shown = ("all_reduce", "compressed") if plan.parameters == "float32" else ("all_reduce",)
    if plan.sync.word not in shown:
        raise SpecError(
            f"{said} does not go with {name(plan.sync.word, plan.sync.method)}: nothing has shown that they work "
            f"together. Use sync={' or '.join(shown)}."
        )
    if plan.exact and plan.parameters != "float32":
        raise SpecError("exact=true does not go with parameters=bfloat16: their sums would lose what order they had.")


def refuse_host(plan: Plan, kind: str) -> None:
    """Raise SpecError where something is to move to host memory on a device that computes in it."""
    for field in ("optimizer", "activations"):
        if getattr(plan.offload, field) == "host" and kind.startswith("cpu"):
            raise SpecError(
                f"offload.{field}=host in the plan moves what is on a device to host memory, but a CPU "
                f"computes in host memory already. Use offload.{field}=disk, or leave it out."
            )


def refuse_other_numbers(plan: Plan, allow: Sequence[str]) -> None:
    """Raise SpecError for formats that change the numbers and that the job does not allow."""
    for field in ("parameters", "states"):
        if getattr(plan, field) != "float32" and field not in allow:
            raise SpecError(
                f"{field}={getattr(plan, field)} in the plan changes the numbers and the job does not allow it. "
                f"Add '{field}' to the job's allow, or leave it out."
            )


def parameter_width(plan: Plan) -> float:
    """Bytes of a parameter, and of its gradient, over those of the parameter as it is built."""
    return 0.5 if plan.parameters == "bfloat16" else 1.0


def optimizer_bytes(plan: Plan, parameters: int, largest: int, state_bytes: int) -> int:
    """Bytes of what the optimizer keeps for `parameters` elements, `state_bytes` each in float32.

    What is offloaded costs at most what a block of `largest` elements has: the pieces that are on their way.
    """
    each = state_bytes * STATE_WIDTH[plan.states] + (
        4 if plan.parameters == "bfloat16" and plan.master != "none" else 0
    )
    here = min(parameters, largest) if plan.offload.optimizer in AWAY else parameters
    return int(here * each)


def repeated(profile: ModelProfile) -> list[BlockProfile]:
    """The blocks that recompute is about: `blocks` of a plan counts these."""
    return [block for block in profile.blocks if block.name not in AROUND]


def kept_bytes(plan: Plan, number: int | None, block: BlockProfile, entering: int) -> int:
    """Bytes that one sample leaves in memory after the forward pass of a block, the repeated one of this number or
    none of them; `entering` come into it. Of recomputed blocks only that is kept."""
    mode = plan.recompute.mode
    if plan.offload.activations in AWAY:
        return 0
    if number is None:
        return block.activation_bytes
    if mode == "full" or (mode == "blocks" and number in plan.recompute.blocks):
        return min(entering, block.activation_bytes)
    if mode == "selective":
        return min(entering + block.product_bytes, block.activation_bytes)
    return block.activation_bytes


def share_again(profile: ModelProfile, plan: Plan) -> float:
    """The share of a forward pass's FLOPs that backward computes again; without products there are next to none."""
    if plan.recompute.mode not in ("full", "blocks") or not profile.forward_flops:
        return 0.0
    chosen = [b for n, b in enumerate(repeated(profile)) if plan.recompute.mode == "full" or n in plan.recompute.blocks]
    return sum(block.forward_flops for block in chosen) / profile.forward_flops


def largest_block(profile: ModelProfile) -> int:
    """The number of parameters of the largest block."""
    return max((block.parameters for block in profile.blocks), default=0)


def _said(plan: Plan) -> str:
    if plan.parameters != "float32":
        return f"parameters={plan.parameters}"
    return f"states={plan.states}" if plan.states != "float32" else f"offload.optimizer={plan.offload.optimizer}"
