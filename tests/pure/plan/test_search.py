"""The default plan, what it predicts, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from shardwise.errors import NoPlanFits, ShardwiseError, SpecError
from shardwise.plan.cost import bucket_bytes
from shardwise.plan.explain import explain
from shardwise.plan.search import search
from shardwise.spec.cluster import Calibration, Cluster, Device, Link, Node
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import parse_plan
from shardwise.spec.profile import BlockProfile, ModelProfile

PROFILE = ModelProfile(
    blocks=tuple(
        BlockProfile(
            name=f"blocks.{i}",
            parameters=10**6,
            parameter_bytes=4 * 10**6,
            forward_flops=1e9,
            activation_bytes=10**7,
            boundary_bytes=10**5,
        )
        for i in range(4)
    )
)
JOB = JobFacts(global_batch=32, steps=10)


def cluster(cores: int = 2, memory_bytes: int = 10**10) -> Cluster:
    device = Device(kind="cpu", memory_bytes=memory_bytes, peak_flops={"float32": 1e11, "bfloat16": 2e11})
    link = Link(latency_s=1e-3, bandwidth=1e9)
    return Cluster(nodes=(Node(devices=(device,) * cores, link=link, cores=cores),))


def test_the_default_plan_is_one_replica_a_device() -> None:
    assert search(PROFILE, cluster(4), JOB).data == 4
    assert search(PROFILE, cluster(64), JOB).data == 32, "no rank without a sample"


def test_the_prediction_adds_up_and_follows_from_the_numbers() -> None:
    plan = search(PROFILE, cluster(2), JOB, parse_plan("sync.bucket_bytes=8000000"))
    assert plan.predicted is not None
    assert plan.predicted.step_s == pytest.approx(sum(plan.predicted.parts_s.values()))
    assert plan.predicted.peak_bytes == sum(plan.predicted.parts_bytes.values())
    assert plan.predicted.parts_s["forward"] == pytest.approx(16 * 4e9 / 1e11)
    assert plan.predicted.parts_s["communication"] == pytest.approx(2 * 1e-3 + 8e6 / 1e9), "the last bucket"
    assert plan.predicted.parts_bytes["optimizer"] == 4 * 10**6 * 8
    assert plan.predicted.parts_bytes["activations"] == 16 * 4 * 10**7


def test_measured_ranks_decide_the_size_of_buckets_and_the_plan_says_so() -> None:
    rows = ((1000, 1e-4), (10**7, 1e-2))
    measured = structs.replace(
        cluster(2), calibrations=(Calibration(backend="gloo", ranks=2, collectives={"all_reduce": rows}),)
    )
    plan = search(PROFILE, measured, JOB)
    assert plan.sync.bucket_bytes == bucket_bytes(PROFILE.parameter_bytes, measured, 2) > 0
    assert f"sync.bucket_bytes={plan.sync.bucket_bytes}" in str(plan)
    assert search(PROFILE, measured, JOB, parse_plan("sync.bucket_bytes=8000000")).sync.bucket_bytes == 8_000_000
    assert search(PROFILE, cluster(2), JOB).sync.bucket_bytes == 0, "where nobody measured, the transport decides"
    assert search(PROFILE, measured, JOB, {"data": 1}).sync.bucket_bytes == 0


def test_microbatches_that_change_the_numbers_must_be_asked_for() -> None:
    norms = structs.replace(PROFILE, batch_norms=True)
    with pytest.raises(NoPlanFits, match=r"batch norms.*microbatches=2"):
        search(norms, cluster(2, memory_bytes=10**8 * 4), JOB)
    assert search(norms, cluster(2), JOB, {"microbatches": 4}).microbatches == 4


def test_microbatches_are_added_until_it_fits() -> None:
    roomy = search(PROFILE, cluster(2), JOB)
    assert roomy.predicted is not None
    tight = search(PROFILE, cluster(2, memory_bytes=roomy.predicted.peak_bytes - 4 * 10**8), JOB)
    assert tight.microbatches == 4
    assert tight.predicted is not None
    assert tight.predicted.peak_bytes <= roomy.predicted.peak_bytes - 4 * 10**8


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(NoPlanFits, match=r"activations .* which has 1\.0 MiB"):
        search(PROFILE, cluster(2, memory_bytes=2**20), JOB)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("expert=2", SpecError, "expert=2, which this version cannot run yet"),
        ("splits.up=column", SpecError, "splits without a tensor axis"),
        ("tensor=2,exact=true", SpecError, "exact=true with a tensor axis"),
        ("pipeline=2", NoPlanFits, "can be cut into 0 at most"),
        ("pipeline=2,exact=true", SpecError, "exact=true with a pipeline"),
        ("context=2", SpecError, "data=2"),
        ("sync=local", SpecError, "sync=local"),
        ("states=int8", SpecError, "allow"),
        ("offload.optimizer=host", SpecError, "computes in host memory"),
        ("data=3", NoPlanFits, "asks for 3 ranks, but this cluster has places for 2"),
        ("precision=bfloat16", SpecError, "allow"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(text: str, kind: type[ShardwiseError], says: str) -> None:
    with pytest.raises(kind) as caught:
        search(PROFILE, cluster(2), JOB, parse_plan(text))
    assert says in str(caught.value)


def test_allowed_precision_is_used() -> None:
    allowed = structs.replace(JOB, allow=("bfloat16",))
    assert search(PROFILE, cluster(2), allowed, parse_plan("precision=bfloat16")).precision == "bfloat16"
    assert search(PROFILE, cluster(2), structs.replace(JOB, precision="bfloat16")).precision == "bfloat16"


def test_more_ranks_than_samples_are_refused() -> None:
    with pytest.raises(NoPlanFits, match="global_batch=2"):
        search(PROFILE, cluster(4), structs.replace(JOB, global_batch=2), parse_plan("data=4"))


def test_the_explanation_names_the_parts() -> None:
    fixed: dict[str, Any] = parse_plan("data=2,exact=true")
    text = explain(search(PROFILE, cluster(2), JOB, fixed), PROFILE, cluster(2), JOB)
    for word in ("data=2", "4.0 M parameters", "communication", "activations", "4 logical shards", "its price"):
        assert word in text
