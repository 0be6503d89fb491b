"""What a pipeline costs: seconds of its stages and of its bubble, bytes on its fullest rank."""

from __future__ import annotations

import math

from shardwise.plan.formats import kept_bytes, optimizer_bytes, parameter_width, repeated
from shardwise.plan.stages import Chain, Seconds, chain
from shardwise.spec.job import JobFacts
from shardwise.spec.layout import stage_rank
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile

BACKWARD = 2  # times forward (Narayanan et al. 2021, section 5.1)
ALL_AT_ONCE = ("gpipe",)
ONE_AT_ONCE = ("naive",)


def in_flight(plan: Plan, stage: int) -> int:
    """How many microbatches' activations a stage keeps at once.

    All of them for GPipe; for 1F1B as many as there are ranks from here on; with several stages a rank what the
    warm-up of Narayanan et al. 2021 (section 2.2) has, shared out over the rank's stages.
    """
    if plan.schedule in ONE_AT_ONCE:
        return 1
    if plan.schedule in ALL_AT_ONCE:
        return plan.microbatches
    ahead = plan.pipeline - stage_rank(stage, plan)
    if plan.virtual > 1:
        ahead = math.ceil(((plan.virtual - 1) * plan.pipeline + 2 * ahead - 1) / plan.virtual)
    return min(plan.microbatches, ahead)


def micro_samples(plan: Plan, job: JobFacts) -> int:
    """Samples of a microbatch on one replica, the largest."""
    return -(-job.global_batch // (plan.replicas * plan.microbatches))


def stage_seconds(
    plan: Plan, profile: ModelProfile, job: JobFacts, *, rate: float, bandwidth: float, room: int
) -> Seconds:
    """Seconds of a stage for one microbatch, forward and backward, with what it sends; infinite where the stage alone
    needs more than `room` bytes (0: whatever it needs)."""
    calls, samples = chain(profile), micro_samples(plan, job)

    def seconds(stage: int, first: int, last: int) -> float:
        if room and sum(_bytes(profile, calls, plan, job, stage, first, last).values()) > room:
            return math.inf
        work = (1 + BACKWARD) * calls.forward_flops(first, last) * samples / rate
        return work + calls.crossing_bytes(first, last) * samples / bandwidth

    return seconds


def pipeline_seconds(plan: Plan, seconds: Seconds) -> tuple[float, float]:
    """Of a step: what the busiest rank computes and sends, and how long it is idle in the bubble, which is
    (pipeline - 1) / virtual microbatches long (Narayanan et al. 2021, section 2.2)."""
    ranks = [0.0] * plan.pipeline
    for number, stage in enumerate(plan.stages):
        ranks[stage_rank(number, plan)] += seconds(number, stage.first, stage.last)
    busiest = max(ranks)
    if plan.schedule in ONE_AT_ONCE:
        return plan.microbatches * busiest, plan.microbatches * (sum(ranks) - busiest)
    return plan.microbatches * busiest, (plan.pipeline - 1) / plan.virtual * busiest


def pipeline_bytes(profile: ModelProfile, plan: Plan, job: JobFacts) -> dict[str, int]:
    """Bytes by part on the rank that needs most."""
    calls = chain(profile)
    ranks: list[dict[str, int]] = [{} for _ in range(plan.pipeline)]
    for number, stage in enumerate(plan.stages):
        here = ranks[stage_rank(number, plan)]
        for part, size in _bytes(profile, calls, plan, job, number, stage.first, stage.last).items():
            here[part] = here.get(part, 0) + size
    return max(ranks, key=lambda parts: sum(parts.values()))


def _bytes(
    profile: ModelProfile, calls: Chain, plan: Plan, job: JobFacts, stage: int, first: int, last: int
) -> dict[str, int]:
    count, size = calls.parameters(first, last)
    samples = micro_samples(plan, job)
    width = 0.5 if plan.precision in ("bfloat16", "float16") else 1.0
    kept, again = _activations(profile, calls, plan, first, last)
    kept = kept * in_flight(plan, stage) + again
    arriving = calls.arriving_bytes(first) * plan.microbatches  # each microbatch has a place to arrive at
    size = int(size * parameter_width(plan))
    largest = max(one.parameters for one in calls.calls[first : last + 1])
    return {
        "parameters": size,
        "gradients": size,
        "optimizer": optimizer_bytes(plan, count, largest, job.state_bytes_per_parameter),
        "activations": int((kept + arriving) * samples * width),
    }


def _activations(profile: ModelProfile, calls: Chain, plan: Plan, first: int, last: int) -> tuple[int, int]:
    """Bytes that one sample leaves after the forward pass of these calls, and those of the fullest one that runs again
    in backward."""
    if plan.recompute.mode == "none" and plan.offload.activations == "none":
        return calls.activation_bytes(first, last), 0
    blocks = {block.name: (number, block) for number, block in enumerate(repeated(profile))}
    kept, again = 0, 0
    for one in calls.calls[first : last + 1]:
        number, block = blocks.get(one.name, (None, None))
        here = one.activation_bytes if block is None else kept_bytes(plan, number, block, one.crossing_bytes)
        here = 0 if plan.offload.activations != "none" else here
        kept, again = kept + here, max(again, one.activation_bytes - here)
    return kept, again
