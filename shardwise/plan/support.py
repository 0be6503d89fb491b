"""What the runtime of this version can do; a plan that asks for more is refused before anything starts."""

from __future__ import annotations

from shardwise.errors import NoPlanFits, SpecError
from shardwise.plan.synchronisations import refuse_unallowed, refuse_unshown
from shardwise.spec.cluster import Cluster
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import AXES, Plan

BUILT_AXES = ("data",)

NEUTRAL = ("float32", "float64")


def refuse_unbuilt(plan: Plan) -> None:
    """Raise SpecError for the first field of `plan` that no runtime exists for yet."""
    for axis in AXES:
        if axis not in BUILT_AXES and getattr(plan, axis) > 1:
            raise _unbuilt(f"{axis}={getattr(plan, axis)}", f"use the data axis instead, such as data={plan.ranks}")
    refuse_unshown(plan)
    if plan.recompute.mode != "none":
        raise _unbuilt(f"recompute={plan.recompute.mode}", "use recompute=none and more microbatches")
    for name in ("optimizer", "activations"):
        if getattr(plan.offload, name) != "none":
            raise _unbuilt(f"offload.{name}={getattr(plan.offload, name)}", f"leave offload.{name} out")
    if plan.splits or plan.stages or plan.virtual > 1:
        raise _unbuilt("splits, stages or virtual", "leave them out")


def refuse_places(plan: Plan, cluster: Cluster) -> None:
    """Raise NoPlanFits when `plan` has more ranks than the cluster has places for."""
    places = sum(max(len(node.devices), node.cores if _on_cpu(node.devices) else 0) for node in cluster.nodes)
    if plan.ranks > places:
        kind = cluster.devices[0].kind
        raise NoPlanFits(
            f"the plan {plan} asks for {plan.ranks} ranks, but this cluster has places for {places} ({kind}): "
            f"more ranks than that would only wait for each other. Use data={places}, or a cluster with more devices."
        )


def refuse_misfit(plan: Plan, job: JobFacts) -> None:
    """Raise NoPlanFits when `plan` has more ranks than the job has samples, SpecError when it breaks `allow`."""
    if plan.ranks > job.global_batch:
        raise NoPlanFits(
            f"the plan {plan} asks for {plan.ranks} ranks, but global_batch={job.global_batch} has fewer "
            f"samples than that. Raise global_batch of the job or use data={job.global_batch}."
        )
    if plan.precision != job.precision and plan.precision not in (*NEUTRAL, *job.allow):
        raise SpecError(
            f"the plan's precision={plan.precision} changes the numbers and the job does not allow it. "
            f"Add '{plan.precision}' to the job's allow, or set its precision."
        )
    refuse_unallowed(plan, job.allow)


def _on_cpu(devices: tuple[object, ...]) -> bool:
    return all(getattr(device, "kind", "").startswith("cpu") for device in devices)


def _unbuilt(what: str, instead: str) -> SpecError:
    return SpecError(f"the plan asks for {what}, which this version cannot run yet; {instead}.")
