"""What formats and places in a plan cost, and which are refused."""

from __future__ import annotations

import pytest

from shardwise.errors import SpecError
from shardwise.plan.cost import time_parts
from shardwise.plan.formats import refuse_other_numbers
from shardwise.plan.memory import memory_parts
from shardwise.plan.support import refuse_unbuilt
from shardwise.spec.cluster import Cluster, Device, Link, Node
from shardwise.spec.job import JobFacts
from shardwise.spec.plan import Plan, build_plan, parse_plan
from shardwise.spec.profile import BlockProfile, ModelProfile

MILLION = 10**6


def block(name: str, activation_bytes: int = 100_000) -> BlockProfile:
    return BlockProfile(
        name=name,
        parameters=MILLION,
        parameter_bytes=4 * MILLION,
        forward_flops=1e9,
        activation_bytes=activation_bytes,
        boundary_bytes=1_000,
        product_bytes=30_000,
    )


PROFILE = ModelProfile(blocks=(block("before", 7_000), *(block(f"blocks.{i}") for i in range(4)), block("after", 500)))
JOB = JobFacts(global_batch=10, steps=1)


def parts(text: str) -> dict[str, int]:
    return memory_parts(PROFILE, build_plan(parse_plan(text)), JOB, on_cpu=False)


@pytest.mark.parametrize(
    ("text", "bytes_a_parameter"),
    [
        ("data=1", (4, 4, 8)),
        ("states=bfloat16", (4, 4, 4)),
        ("states=int8", (4, 4, 2 + 8 / 256)),
        ("parameters=bfloat16,precision=bfloat16", (2, 2, 12)),
        ("parameters=bfloat16,precision=bfloat16,master=none,states=bfloat16", (2, 2, 4)),
        ("offload.optimizer=disk", (4, 4, 8 / 6)),
        ("offload.optimizer=disk,parameters=bfloat16,precision=bfloat16", (2, 2, 12 / 6)),
    ],
)
def test_bytes_of_formats(text: str, bytes_a_parameter: tuple[float, ...]) -> None:
    found = parts(text)
    for part, each in zip(("parameters", "gradients", "optimizer"), bytes_a_parameter, strict=True):
        assert found[part] == pytest.approx(6 * MILLION * each), part


@pytest.mark.parametrize(
    ("text", "kept", "again"),
    [
        ("data=1", 407_500, 0),
        ("recompute=full", 7_500 + 4 * 1_000, 99_000),
        ("recompute=selective", 7_500 + 4 * 31_000, 69_000),
        ("recompute=blocks,recompute.blocks=0+3", 7_500 + 2 * 1_000 + 200_000, 99_000),
        ("offload.activations=disk", 0, 100_000),
    ],
)
def test_bytes_of_activations(text: str, kept: int, again: int) -> None:
    assert parts(text)["activations"] == 10 * (kept + again)


@pytest.mark.parametrize(
    "text",
    [
        "recompute=blocks,recompute.blocks=0+2",
        "recompute=full,offload.optimizer=disk",
        "parameters=bfloat16,master=none",
    ],
)
def test_a_plan_string_reads_back(text: str) -> None:
    plan = build_plan(parse_plan(text))
    assert build_plan(parse_plan(str(plan))) == plan
    assert parse_plan(str(plan)) == parse_plan(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recompute=blocks", "needs their numbers"),
        ("recompute=full,recompute.blocks=1", "is for recompute=blocks"),
        ("recompute=blocks,recompute.blocks=one", "numbers of blocks"),
        ("master=none", "parameters=bfloat16"),
        ("parameters=bfloat16", "precision=bfloat16"),
        ("states=int8,precision=float64", "precision=float64"),
        ("parameters=bfloat16,precision=bfloat16,data=2,sync=compressed", "Use sync=all_reduce"),
        ("states=int8,data=2,sync=auto", "Use sync=all_reduce or compressed"),
        ("offload.optimizer=disk,data=2,sync=local", "all_reduce"),
        ("parameters=bfloat16,precision=bfloat16,exact=true", "exact=true"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        refuse_unbuilt(build_plan(parse_plan(text)))


@pytest.mark.parametrize("axes", ["shard=2,zero=1", "shard=2,zero=3", "tensor=2", "shard=2,tensor=2,pipeline=2"])
@pytest.mark.parametrize("text", ["states=int8", "parameters=bfloat16,precision=bfloat16", "offload.optimizer=disk"])
def test_axes_that_leave_a_rank_a_part_go_with_all_formats(axes: str, text: str) -> None:
    refuse_unbuilt(build_plan(parse_plan(f"{axes},{text}")))


@pytest.mark.parametrize("field", ["parameters", "states"])
def test_formats_that_change_the_numbers_must_be_allowed(field: str) -> None:
    plan = Plan(**{field: "bfloat16"})
    with pytest.raises(SpecError, match=f"'{field}'"):
        refuse_other_numbers(plan, ("bfloat16",))
    refuse_other_numbers(plan, (field,))


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("data=1", 2),
        ("recompute=selective", 2),
        ("recompute=full", 2 + 4 / 6),
        ("recompute=blocks,recompute.blocks=1", 2 + 1 / 6),
    ],
)
def test_seconds_of_what_is_computed_again(text: str, times: float) -> None:
    device = Device(kind="cpu", memory_bytes=10**10, peak_flops={"float32": 1e11})
    here = Cluster(nodes=(Node(devices=(device,), link=Link(latency_s=1e-3, bandwidth=1e9), cores=1),))
    found = time_parts(PROFILE, build_plan(parse_plan(text)), JOB, here)
    assert found["backward"] == pytest.approx(times * found["forward"])
