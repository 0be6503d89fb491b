"""`explain`: a Plan in words: the mesh, where each second and each byte goes, and what limits it."""

from __future__ import annotations

from collections.abc import Mapping

from shardwise.plan.splits import splits_text
from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.layout import stage_rank
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile
from shardwise.units import format_bytes, format_count, format_seconds

# What `bench data_parallel` measured, with 4 logical shards and 2 to 8 samples a rank.
PRICE = {
    "cpu": "its price: up to 8 % of a step where a rank has few samples, nothing where it has many",
    "gpu": "its price: 2 to 4 times the step where the shards are too small to fill the device",
}


def explain(
    plan: Plan, profile: ModelProfile, cluster: Cluster, job: JobFacts, whole: Mapping[str, str] | None = None
) -> str:
    """Several lines of plain text for a terminal; `whole` are the parameters that a tensor axis does not split, and
    why."""
    device = cluster.devices[0]
    per_rank = -(-job.global_batch // plan.replicas)
    lines = [
        f"plan      {plan}",
        f"cluster   {len(cluster.nodes)} node, {len(cluster.devices)} x {device.kind}, "
        f"{format_bytes(device.memory_bytes)} each",
        f"model     {format_count(profile.parameters)} parameters in {len(profile.blocks)} blocks, "
        f"{format_count(3 * profile.forward_flops)}FLOP a sample trained",
        f"mesh      {plan.ranks} rank(s): each{' replica' * (plan.pipeline > 1)} computes {per_rank} of "
        f"{job.global_batch} samples a step" + (f" in {plan.microbatches} microbatches" * (plan.microbatches > 1)),
    ]
    lines += _stages(plan, profile)
    said = splits_text({name: split.how for name, split in plan.splits.items()}, whole or {})
    lines += [("" if number else "splits").ljust(10) + one for number, one in enumerate(said)]
    if plan.exact:
        lines.append(
            f"exact     the same bits on any number of ranks: {job.logical_shards} logical shards, one thread a rank"
        )
        lines.append(f"          {PRICE['cpu' if device.kind.startswith('cpu') else 'gpu']}")
    if plan.predicted:
        lines.append(f"step      at least {format_seconds(plan.predicted.step_s)}, most of it {plan.predicted.limit}")
        lines += [
            f"            {name:<20}{format_seconds(value):>10}" for name, value in plan.predicted.parts_s.items()
        ]
        lines.append(f"memory    {format_bytes(plan.predicted.peak_bytes)} on the fullest device")
        lines += [
            f"            {name:<20}{format_bytes(value):>10}" for name, value in plan.predicted.parts_bytes.items()
        ]
    return "\n".join(lines)


def _stages(plan: Plan, profile: ModelProfile) -> list[str]:
    """For each stage its rank of the pipeline, its parts, and its share of the work."""
    lines, total = [], sum(one.forward_flops for one in profile.calls) or 1.0
    for number, stage in enumerate(plan.stages):
        share = sum(one.forward_flops for one in profile.calls[stage.first : stage.last + 1]) / total
        names = f"{plan.blocks[stage.first]} to {plan.blocks[stage.last]}" + (
            f", with {', '.join(stage.holds)}" if stage.holds else ""
        )
        head = "stages    " if number == 0 else " " * 10
        lines.append(
            f"{head}{number} on rank {stage_rank(number, plan)} of the pipeline: {names}, {share:.0%} of the FLOPs"
        )
    return lines
