"""Seconds a step for a data-parallel plan, by part: a roofline over the probed peak and a ring all-reduce."""

from __future__ import annotations

from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile

ASSUMED_PEAK = 50e9  # FLOP/s of one core in float32, where nothing was probed


def time_parts(profile: ModelProfile, plan: Plan, job: JobFacts, cluster: Cluster) -> dict[str, float]:
    """Seconds by part, as if nothing overlapped and every matmul ran at the device's probed peak: a lower bound.

    Backward is twice forward (Narayanan et al. 2021, section 5.1). A ring all-reduce moves 2 (n - 1) / n of the
    gradient bytes in 2 (n - 1) messages (Thakur et al. 2005, section 3.4).
    """
    samples = -(-job.global_batch // plan.data)
    rate = device_rate(cluster, plan)
    forward = profile.forward_flops * samples / rate
    link = cluster.nodes[0].link if len(cluster.nodes) == 1 else cluster.between
    around = 2 * (plan.data - 1)
    moved = profile.parameter_bytes * around / plan.data
    device = cluster.devices[0]
    touched = profile.parameter_bytes * 3 + 2 * profile.parameters * job.state_bytes_per_parameter
    bandwidth = device.memory_bandwidth or 10e9
    return {
        "forward": forward,
        "backward": 2 * forward,
        "communication": around * link.latency_s + moved / link.bandwidth if plan.data > 1 else 0.0,
        "optimizer": touched / bandwidth,
    }


def device_rate(cluster: Cluster, plan: Plan) -> float:
    """FLOP/s of one rank: a device's peak in the plan's precision; on CPU the peak of its share of the cores."""
    device = cluster.devices[0]
    peak = device.peak_flops.get(plan.precision) or device.peak_flops.get("float32") or ASSUMED_PEAK
    node = cluster.nodes[0]
    if device.kind.startswith("cpu"):
        per_core = peak if len(node.devices) >= node.cores else peak / node.cores
        return per_core * max(1, node.cores // plan.ranks)
    return peak
