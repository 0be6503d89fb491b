"""Seconds a step of a plan, by part: a roofline over the probed peak, and the exposed all-reduces."""

from __future__ import annotations

from collections import Counter

from msgspec import structs

from shardwise.plan.buckets import Seconds, choose_bucket_bytes, exposed_s, ring_seconds
from shardwise.plan.formats import share_again
from shardwise.plan.memory import memory_parts
from shardwise.plan.pipelined import BACKWARD, pipeline_seconds, stage_seconds
from shardwise.spec.cluster import TRANSPORTS, Cluster
from shardwise.spec.collective_cost import Topology, as_path, through
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan
from shardwise.spec.profile import ModelProfile

ASSUMED_PEAK = 50e9  # FLOP/s of one core in float32, where nothing was probed


def time_parts(profile: ModelProfile, plan: Plan, job: JobFacts, cluster: Cluster) -> dict[str, float]:
    """Seconds by part, as if every matmul ran at the device's probed peak: a lower bound.

    Backward is twice forward (Narayanan et al. 2021, section 5.1), and what it
    computes again. `communication` is what backward does not hide; of a
    pipeline what its stages send is in forward and backward, and `bubble` is what the busiest rank is idle. What the
    tensor axis exchanges is not counted.
    """
    samples = -(-job.global_batch // plan.replicas)
    rate = device_rate(cluster, plan)
    held = memory_parts(profile, plan, job, on_cpu=False)
    forward, bubble = profile.forward_flops * samples / rate / plan.tensor, {}
    if plan.stages:
        seconds = stage_seconds(plan, profile, job, rate=rate, bandwidth=cluster.link.bandwidth, room=0)
        busy, idle = pipeline_seconds(plan, seconds)
        forward, bubble = busy / (1 + BACKWARD) / plan.tensor, {"bubble": idle / plan.tensor}
    exchanged = 0.0
    if plan.replicas > 1:
        whole = memory_parts(profile, structs.replace(plan, shard=1), job, on_cpu=False)["gradients"]
        bucket = plan.sync.bucket_bytes or bucket_bytes(whole, cluster, plan.replicas)
        message_s = all_reduce_seconds(cluster, plan.replicas)
        exchanged = exposed_s(whole, bucket, BACKWARD * forward / plan.microbatches, message_s)
        if plan.shard > 1:
            exchanged *= plan.microbatches / 2 if plan.zero > 1 and not plan.stages else 1  # each leaves by rows
            exchanged += _gatherings(plan) * all_reduce_seconds(cluster, plan.shard)(whole) / 2
    device = cluster.devices[0]
    touched = held["parameters"] * 3 + 2 * held["optimizer"]
    bandwidth = device.memory_bandwidth or 10e9
    return {
        "forward": forward,
        "backward": (BACKWARD + share_again(profile, plan)) * forward,
        **bubble,
        "communication": exchanged,
        "optimizer": touched / bandwidth,
    }


def _gatherings(plan: Plan) -> int:
    """How often parameters are gathered in a step, each half of an all-reduce (Rajbhandari et al. 2020, section 7):
    with zero=3 for forward and backward of each microbatch, else after the update."""
    return 2 * plan.microbatches if plan.zero == 3 else 1


def bucket_bytes(gradient_bytes: int, cluster: Cluster, ranks: int) -> int:
    """The size of gradient buckets that costs `ranks` ranks least on this cluster."""
    work_s = TRANSPORTS.get(cluster.transport, TRANSPORTS["gloo"]).work_s
    return choose_bucket_bytes(gradient_bytes, all_reduce_seconds(cluster, ranks), work_s)


def all_reduce_seconds(cluster: Cluster, ranks: int) -> Seconds:
    """Seconds of an all-reduce between `ranks` ranks by its bytes, as they were measured; else a ring's over the link.

    Between nodes, where nothing was measured, it is the cheapest way through them (`collective_cost.through`).

    Where another number of ranks was measured its figures are carried over as a ring's would be: the latency grows with
    its 2 (n - 1) messages, the rest with 2 (n - 1) / n of the bytes.
    """
    known = cluster.calibration(ranks)
    ring_s = ring_seconds(ranks, cluster.link)
    if known is None:
        return ring_s if len(cluster.nodes) == 1 else _through_nodes(cluster, ranks)
    more = (ranks - 1) / (known.ranks - 1)

    def seconds(nbytes: int) -> float:
        latency, measured = known.seconds("all_reduce", 0), known.seconds("all_reduce", nbytes)
        if latency is None or measured is None:
            return ring_s(nbytes)
        return latency * more + (measured - latency) * more * known.ranks / ranks

    return seconds


def _through_nodes(cluster: Cluster, ranks: int) -> Seconds:
    """Of `ranks` ranks that fill node after node."""
    places = [index for index, node in enumerate(cluster.nodes) for _ in node.devices]
    used = [places[rank % len(places)] for rank in range(ranks)]
    counts = Counter(used)
    inside = min((cluster.nodes[index].link for index in counts), key=lambda link: link.bandwidth)
    topology = Topology(tuple(counts[index] for index in sorted(counts)), as_path(inside), (as_path(cluster.between),))
    return lambda nbytes: through("all_reduce", nbytes, topology).seconds


def device_rate(cluster: Cluster, plan: Plan) -> float:
    """FLOP/s of one rank: a device's peak in the plan's precision; on CPU the peak of its share of the cores."""
    device = cluster.devices[0]
    peak = device.peak_flops.get(plan.precision) or device.peak_flops.get("float32") or ASSUMED_PEAK
    node = cluster.nodes[0]
    if device.kind.startswith("cpu"):
        per_core = peak if len(node.devices) >= node.cores else peak / node.cores
        return per_core * max(1, node.cores // plan.ranks)
    return peak
