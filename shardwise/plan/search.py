"""`search`: the Plan for a job on a cluster. Only fields that keep the numbers are ever varied."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from shardwise.errors import NoPlanFits
from shardwise.plan.cost import bucket_bytes, device_rate, time_parts
from shardwise.plan.memory import memory_parts
from shardwise.plan.pipelined import stage_seconds
from shardwise.plan.stages import with_stages
from shardwise.plan.support import refuse_misfit, refuse_places, refuse_unbuilt
from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan, Prediction, build_plan
from shardwise.spec.profile import ModelProfile
from shardwise.units import format_bytes


def search(
    profile: ModelProfile,
    cluster: Cluster,
    job: JobFacts,
    fixed: dict[str, Any] | None = None,
    *,
    started: int | None = None,
) -> Plan:
    """One replica a device, and as few microbatches as fit in memory; `fixed` holds the fields that the user chose.

    A model with batch norms gets more microbatches only where `fixed` says so: they change its numbers.
    `started` is the number of ranks where a foreign launcher has started them, wherever they are.
    Raises SpecError for a field that cannot run, NoPlanFits when no number of microbatches fits.
    """
    fixed = dict(fixed or {})
    plan = build_plan({"precision": job.precision, **fixed})
    refuse_unbuilt(plan)
    if "data" not in fixed:
        plan = structs.replace(plan, data=max(1, min(len(cluster.devices) // plan.ranks, job.global_batch)))
    if started is None:
        refuse_places(plan, cluster)
    elif started != plan.ranks:
        raise NoPlanFits(
            f"the plan {plan} has {plan.ranks} ranks, but {started} were started. Start {plan.ranks} ranks."
        )
    refuse_misfit(plan, job)
    room = min(device.memory_bytes for device in cluster.devices)
    largest = max(1, job.global_batch // plan.replicas)
    plan = _buckets(plan, profile, cluster)
    if "microbatches" not in fixed and not profile.batch_norms:
        plan = structs.replace(plan, microbatches=max(plan.microbatches, min(largest, filling(plan))))
    asked = plan.stages
    while True:
        plan = settled(structs.replace(plan, stages=asked), profile, cluster, job)
        assert plan.predicted is not None
        if not room or plan.predicted.peak_bytes <= room:
            return plan
        more = not plan.exact and plan.microbatches < largest
        if "microbatches" in fixed or profile.batch_norms or not more:
            raise _too_big(plan.predicted, plan, room, more=more, norms=profile.batch_norms)
        plan = structs.replace(plan, microbatches=min(largest, plan.microbatches * 2))


def filling(plan: Plan) -> int:
    """How many microbatches keep the ranks of a pipeline busy: four for each, so that a fifth of a step is idle."""
    return 4 * plan.pipeline if plan.pipeline > 1 else 1


def settled(plan: Plan, profile: ModelProfile, cluster: Cluster, job: JobFacts) -> Plan:
    """The plan with its stages, where it has a pipeline, and with what it should take.

    Raises NoPlanFits where the model has too few parts for the stages.
    """
    if plan.pipeline > 1:
        rate, bandwidth = device_rate(cluster, plan), cluster.link.bandwidth
        room = min(device.memory_bytes for device in cluster.devices)
        fitting, any_size = (
            stage_seconds(plan, profile, job, rate=rate, bandwidth=bandwidth, room=limit) for limit in (room, 0)
        )
        try:
            plan = with_stages(plan, profile, fitting)
        except NoPlanFits:  # what does not fit is told in the end, with all its parts
            plan = with_stages(plan, profile, any_size)
    return structs.replace(plan, predicted=predict(profile, plan, job, cluster))


def _buckets(plan: Plan, profile: ModelProfile, cluster: Cluster) -> Plan:
    """The size of gradient buckets where it was left open and ranks have measured each other on this cluster.

    Elsewhere the ranks take what their transport usually asks for (`buckets.usual_bucket_bytes`).
    """
    if plan.sync.bucket_bytes or plan.replicas == 1 or not cluster.calibrations:
        return plan
    chosen = bucket_bytes(profile.parameter_bytes, cluster, plan.replicas)
    return structs.replace(plan, sync=structs.replace(plan.sync, bucket_bytes=chosen))


def predict(profile: ModelProfile, plan: Plan, job: JobFacts, cluster: Cluster) -> Prediction:
    """What a step of `plan` should take: seconds and bytes, by part."""
    seconds = time_parts(profile, plan, job, cluster)
    sizes = memory_parts(profile, plan, job, on_cpu=cluster.devices[0].kind.startswith("cpu"))
    return Prediction(
        step_s=sum(seconds.values()),
        peak_bytes=sum(sizes.values()),
        parts_s=seconds,
        parts_bytes=sizes,
        limit=max(seconds, key=lambda part: seconds[part]),
    )


def _too_big(predicted: Prediction, plan: Plan, room: int, *, more: bool, norms: bool) -> NoPlanFits:
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in predicted.parts_bytes.items())
    why = (
        " More microbatches change the numbers of its batch norms, so they must be asked for." if more and norms else ""
    )
    asked = f"microbatches={2 * plan.microbatches}, " if more else ""
    return NoPlanFits(
        f"the plan {plan} needs {format_bytes(predicted.peak_bytes)} on its fullest device ({parts}), which has "
        f"{format_bytes(room)}.{why} Use {asked}a smaller model, or a device with more memory."
    )
