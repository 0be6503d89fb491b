"""What the runtime of this version can do; a plan that asks for more is refused before anything starts."""

from __future__ import annotations

from shardwise.errors import NoPlanFits, SpecError, did_you_mean
from shardwise.plan.formats import refuse_formats, refuse_host, refuse_other_numbers
from shardwise.plan.synchronisations import refuse_together, refuse_unallowed, refuse_unshown
from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import AXES, Plan

BUILT_AXES = ("data", "shard", "tensor", "pipeline")
ONE_STAGE = ("naive", "gpipe", "1f1b")  # schedules of one stage a rank
SEVERAL_STAGES = ("interleaved", "zero_bubble", "zbv")  # and of `virtual` stages a rank

NEUTRAL = ("float32", "float64")


def refuse_unbuilt(plan: Plan) -> None:
    """Raise SpecError for the first field of `plan` that no runtime exists for yet."""
    for axis in AXES:
        if axis not in BUILT_AXES and getattr(plan, axis) > 1:
            raise _unbuilt(f"{axis}={getattr(plan, axis)}", f"use the data axis instead, such as data={plan.ranks}")
    refuse_unshown(plan)
    refuse_formats(plan)
    _refuse_schedule(plan)
    if plan.splits and plan.tensor == 1:
        raise SpecError("the plan has splits without a tensor axis. Add tensor=2 or more, or leave them out.")
    _refuse_together(plan)


def _refuse_together(plan: Plan) -> None:
    """Raise SpecError for axes that do not go with the rest of the plan."""
    for axis, called in (("shard", "a shard axis"), ("tensor", "a tensor axis"), ("pipeline", "a pipeline")):
        if getattr(plan, axis) > 1:
            refuse_together(plan, axis, f"{axis}={getattr(plan, axis)}")
            if plan.exact:
                raise _unbuilt(f"exact=true with {called}", "use the data axis alone, or exact=false")


def _refuse_schedule(plan: Plan) -> None:
    """Raise SpecError for a schedule that is unknown or does not go with the number of stages a rank has."""
    if plan.schedule not in (*ONE_STAGE, *SEVERAL_STAGES):
        raise SpecError(
            f"schedule='{plan.schedule}' in the plan is not known"
            f"{did_you_mean(plan.schedule, (*ONE_STAGE, *SEVERAL_STAGES))}"
        )
    if plan.pipeline == 1 and (plan.virtual > 1 or plan.stages):
        raise SpecError("the plan has virtual or stages without a pipeline. Add pipeline=2 or more, or leave them out.")
    if plan.pipeline > 1 and (plan.virtual > 1) != (plan.schedule in SEVERAL_STAGES):
        raise SpecError(
            f"schedule={plan.schedule} does not go with virtual={plan.virtual}: {', '.join(SEVERAL_STAGES)} have "
            f"virtual=2 or more stages a rank, {', '.join(ONE_STAGE)} have one."
        )
    if plan.sequence and plan.schedule in ("zero_bubble", "zbv"):
        raise _unbuilt(
            f"sequence=true with schedule={plan.schedule}, which goes back through each block twice",
            "use schedule=1f1b or interleaved, or sequence=false",
        )
    if plan.schedule == "zbv" and plan.virtual != 2:
        raise SpecError(f"schedule=zbv has two stages a rank, not virtual={plan.virtual}. Use virtual=2.")


def refuse_places(plan: Plan, cluster: Cluster) -> None:
    """Raise NoPlanFits when `plan` has more ranks than the cluster has places for, SpecError for a place in memory that
    its devices do not have."""
    refuse_host(plan, cluster.devices[0].kind)
    places = sum(max(len(node.devices), node.cores if _on_cpu(node.devices) else 0) for node in cluster.nodes)
    if plan.ranks > places:
        kind = cluster.devices[0].kind
        raise NoPlanFits(
            f"the plan {plan} asks for {plan.ranks} ranks, but this cluster has places for {places} ({kind}): "
            f"more ranks than that would only wait for each other. Use data={places}, or a cluster with more devices."
        )


def refuse_misfit(plan: Plan, job: JobFacts) -> None:
    """Raise NoPlanFits when `plan` has more replicas than the job has samples, SpecError when it breaks `allow`."""
    if plan.replicas > job.global_batch:
        raise NoPlanFits(
            f"the plan {plan} asks for {plan.replicas} replicas, but global_batch={job.global_batch} has fewer "
            f"samples than that. Raise global_batch of the job or use data={job.global_batch}."
        )
    _refuse_unequal(plan, job)
    if plan.precision != job.precision and plan.precision not in (*NEUTRAL, *job.allow):
        raise SpecError(
            f"the plan's precision={plan.precision} changes the numbers and the job does not allow it. "
            f"Add '{plan.precision}' to the job's allow, or set its precision."
        )
    refuse_other_numbers(plan, job.allow)
    refuse_unallowed(plan, job.allow)


def _refuse_unequal(plan: Plan, job: JobFacts) -> None:
    """Raise NoPlanFits where ranks that gather a model's parts together would have unlike numbers of microbatches."""
    least, more = divmod(job.global_batch, plan.replicas)
    if plan.shard > 1 and plan.zero > 1 and more and least < plan.microbatches:
        raise NoPlanFits(
            f"the plan {plan} gives some of its {plan.replicas} ranks {least} samples and others {least + 1}, so not "
            f"the same number of microbatches ({plan.microbatches}), which shard={plan.shard} with zero={plan.zero} "
            f"needs. Use microbatches={max(1, least)}, or a global_batch that {plan.replicas} divides."
        )


def _on_cpu(devices: tuple[object, ...]) -> bool:
    return all(getattr(device, "kind", "").startswith("cpu") for device in devices)


def _unbuilt(what: str, instead: str) -> SpecError:
    return SpecError(f"the plan asks for {what}, which this version cannot run yet; {instead}.")
