"""Bytes on the fullest device of a plan, by part."""

from __future__ import annotations

from shardwise.plan.formats import kept_bytes, largest_block, optimizer_bytes, parameter_width, repeated
from shardwise.plan.pipelined import pipeline_bytes
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile

PROCESS_BYTES = 267 * 2**20  # resident size of a Python process that has imported torch 2.13's CPU build, measured


def memory_parts(profile: ModelProfile, plan: Plan, job: JobFacts, *, on_cpu: bool) -> dict[str, int]:
    """Bytes by part for one rank at the end of its largest microbatch's forward pass, when activations peak.

    Weights, gradients and optimizer states as in Rajbhandari et al. 2020, section 3.1; activations as the profile
    counted them for one sample, halved under 16-bit autocast.
    """
    samples = -(-job.global_batch // (plan.replicas * plan.microbatches))
    if plan.exact:
        samples = -(-job.global_batch // job.logical_shards)
    width = 0.5 if plan.precision in ("bfloat16", "float16") else 1.0
    size = int(profile.parameter_bytes * parameter_width(plan))
    parts = {
        "parameters": size,
        "gradients": size,
        "optimizer": optimizer_bytes(plan, profile.parameters, largest_block(profile), job.state_bytes_per_parameter),
        "activations": int(_activations(profile, plan) * samples * width),
    }
    if plan.stages:
        parts = pipeline_bytes(profile, plan, job)
    for part in ("parameters", "gradients", "optimizer"):
        parts[part] = -(-parts[part] // plan.tensor)  # as if all were split: norms, which are not, are small
    largest = max((block.parameter_bytes for block in profile.blocks), default=0)
    _shard(parts, plan, profile)
    if plan.replicas > 1 or plan.microbatches > 1 or plan.exact:
        parts["arriving gradients"] = largest  # autograd's own tensor lives until it is added to its bucket
    if on_cpu:
        parts["process"] = PROCESS_BYTES
    return parts


def _shard(parts: dict[str, int], plan: Plan, profile: ModelProfile) -> None:
    """What the shard axis leaves of it on a rank (Rajbhandari et al. 2020, section 5). Stages keep whole gradients.

    With zero=3 two of the blocks are whole at a time, the one that computes and one whose gradients leave; what is in
    no block is whole for all of the step, and so is its gradient in the end.
    """
    width = parameter_width(plan)
    each = [int(block.parameter_bytes * width) for block in repeated(profile)]
    largest, rest = max(each, default=0), int(profile.parameter_bytes * width) - sum(each)
    sharded = {"optimizer": 1, "gradients": 2, "parameters": 3}
    for part, zero in sharded.items():
        if plan.zero >= zero and not (part == "gradients" and plan.stages):
            parts[part] = -(-parts[part] // plan.shard)
    if plan.shard > 1 and plan.zero > 1:
        parts["gathered"] = 2 * largest + 2 * rest if plan.zero == 3 else largest


def _activations(profile: ModelProfile, plan: Plan) -> int:
    """Bytes of one sample: what the blocks keep, and what the fullest of those that keep less has while it runs again
    in backward."""
    entering = [0, *(block.boundary_bytes for block in profile.blocks)]
    numbers = {block.name: number for number, block in enumerate(repeated(profile))}
    kept, again = 0, 0
    for place, block in enumerate(profile.blocks):
        here = kept_bytes(plan, numbers.get(block.name), block, entering[place])
        again = max(again, block.activation_bytes - here)
        kept += here
    return kept + again
