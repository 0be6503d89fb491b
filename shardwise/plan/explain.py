"""`explain`: a Plan in words: the mesh, where each second and each byte goes, and what limits it."""

from __future__ import annotations

from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile
from shardwise.units import format_bytes, format_count, format_seconds

# What `bench data_parallel` measured, with 4 logical shards and 2 to 8 samples a rank.
PRICE = {
    "cpu": "its price: up to 8 % of a step where a rank has few samples, nothing where it has many",
    "gpu": "its price: 2 to 4 times the step where the shards are too small to fill the device",
}


def explain(plan: Plan, profile: ModelProfile, cluster: Cluster, job: JobFacts) -> str:
    """Several lines of plain text for a terminal."""
    device = cluster.devices[0]
    per_rank = -(-job.global_batch // plan.data)
    lines = [
        f"plan      {plan}",
        f"cluster   {len(cluster.nodes)} node, {len(cluster.devices)} x {device.kind}, "
        f"{format_bytes(device.memory_bytes)} each",
        f"model     {format_count(profile.parameters)} parameters in {len(profile.blocks)} blocks, "
        f"{format_count(3 * profile.forward_flops)}FLOP a sample trained",
        f"mesh      {plan.ranks} rank(s): each computes {per_rank} of {job.global_batch} samples a step"
        + (f" in {plan.microbatches} microbatches" if plan.microbatches > 1 else ""),
    ]
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
