"""What a pipeline costs: seconds of its stages and of its bubble, bytes on its fullest rank."""

from __future__ import annotations

import math

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
        if room and sum(_bytes(calls, plan, job, stage, first, last).values()) > room:
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
        for part, size in _bytes(calls, plan, job, number, stage.first, stage.last).items():
            here[part] = here.get(part, 0) + size
    return max(ranks, key=lambda parts: sum(parts.values()))


def _bytes(calls: Chain, plan: Plan, job: JobFacts, stage: int, first: int, last: int) -> dict[str, int]:
    count, size = calls.parameters(first, last)
    samples = micro_samples(plan, job)
    width = 0.5 if plan.precision in ("bfloat16", "float16") else 1.0
    kept = calls.activation_bytes(first, last) * in_flight(plan, stage)
    arriving = calls.arriving_bytes(first) * plan.microbatches  # each microbatch has a place to arrive at
    return {
        "parameters": size,
        "gradients": size,
        "optimizer": count * job.state_bytes_per_parameter,
        "activations": int((kept + arriving) * samples * width),
    }
