"""What `verify` finds, and how it makes a plan small enough to be found out about in seconds."""

from __future__ import annotations

from msgspec import Struct, structs

from shardwise.errors import NoPlanFits, SpecError
from shardwise.plan.splits import splits_text
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan

TOLERANCE = 1e-6  # relative, in float64
SAMPLES = 2  # of a microbatch, where the job does not say how to be small


class Difference(Struct, frozen=True, kw_only=True):
    """The largest relative error of one kind, `where` it is, and `first`: the first in the order of the module that is
    above the tolerance. The error is None where one side has no number."""

    error: float | None = 0.0
    where: str = ""
    first: str = ""


class Verified(Struct, frozen=True, kw_only=True):
    """What `verify` found. `ran` is the plan that was run in the place of the one that was asked for."""

    asked: str
    ran: str
    ranks: int
    steps: int
    losses: tuple[float, ...]
    expected: tuple[float, ...]
    blocks: int  # in the longest list of alike blocks of what was run
    outputs: Difference
    loss: Difference
    gradients: Difference
    parameters: Difference
    buffers: Difference
    cause: str = ""
    splits: dict[str, str] = {}  # over the tensor axis: how
    whole: dict[str, str] = {}  # and why not

    @property
    def same(self) -> bool:
        """Whether everything is within the tolerance."""
        return not self.cause

    def text(self) -> str:
        """Several lines for a terminal."""
        lines = [f"{self.ran} on {self.ranks} rank(s) against one, {self.steps} steps in float64 (asked: {self.asked})"]
        lines += [f"  a model of {self.blocks} blocks"] if self.blocks else []
        lines += [f"  {said}" for said in splits_text(self.splits, self.whole)]
        for name in ("outputs", "loss", "gradients", "parameters", "buffers"):
            found: Difference = getattr(self, name)
            much = "is not a number" if found.error is None else f"at most {found.error:.1e}"
            lines.append(f"  {name:<10} relative error {much}" + (f" ({found.where})" if found.where else ""))
        if self.same:
            return "\n".join([*lines, f"The plan computes the same, within {TOLERANCE:g}."])
        return "\n".join([*lines, f"The plan does not compute the same: {self.cause}"])


def shrunk(plan: Plan, facts: JobFacts, *, norms: bool, parts: int) -> tuple[Plan, int]:
    """As much of a plan as matters, in float64, and its global batch: two replicas, and four ranks of a pipeline or as
    many as the small model has `parts` for, show what any number does. Norms over the batch are verified on one
    replica, which alone has the same batches as one device.

    Raises SpecError for a plan that changes the numbers by its nature, NoPlanFits for a model without so many parts.
    """
    if plan.sync.word != "all_reduce":
        raise SpecError(
            f"sync={plan.sync.word} changes the numbers by its nature, so there is nothing to verify. Verify the plan "
            "with sync=all_reduce; what it does to the loss is what `python -m bench slow_link` compares."
        )
    if plan.pipeline > 1 and parts < 2 * plan.virtual:
        raise NoPlanFits(
            f"the plan {plan} needs {2 * plan.virtual} stages at least, but the small copy of the model has {parts} "
            "parts to cut between. Let `small` of the job leave more blocks."
        )
    data = 1 if norms else min(plan.data, 2)
    shard = 1 if norms else min(plan.shard, 2)
    tensor = min(plan.tensor, 4)
    pipeline = min(plan.pipeline, 4, max(1, parts // plan.virtual))
    micros = plan.microbatches if norms else min(max(plan.microbatches, 2 * pipeline), 2 * pipeline * plan.virtual)
    few = structs.replace(plan, data=data, shard=shard, tensor=tensor, pipeline=pipeline, stages=(), blocks=())
    few = structs.replace(few, precision="float64", microbatches=1 if plan.exact else micros, predicted=None)
    few = structs.replace(few, parameters="float32", master="float32", states="float32")  # these change the numbers
    return few, min(facts.global_batch, SAMPLES * few.replicas * micros)
