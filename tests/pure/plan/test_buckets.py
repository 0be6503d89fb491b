"""The size of gradient buckets against a search over all of them, and what is predicted to be exposed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.plan.buckets import choose_bucket_bytes, exposed_s, ring_seconds, usual_bucket_bytes
from shardwise.plan.cost import all_reduce_seconds, bucket_bytes
from shardwise.spec.cluster import Calibration, Cluster, Device, Link, Node

FREE = 1e15  # bytes/s of a transport that takes nothing from computing


def count(gradient_bytes: int, size: int) -> int:
    return -(-gradient_bytes // size)


def cost(gradient_bytes: int, buckets: int, latency_s: float, bandwidth: float, wake_s: float, work: float) -> float:
    """What the docstring promises, written down once more."""
    size = gradient_bytes / buckets
    return (buckets - 1) * (wake_s + size / work + latency_s) + latency_s + size / bandwidth


links = st.tuples(st.floats(1e-6, 1e-2), st.floats(1e6, 1e11), st.floats(0, 1e-2), st.floats(1e8, FREE))


@given(st.integers(1, 10**10), links)
def test_no_other_number_of_buckets_costs_less(gradient_bytes: int, link: tuple[float, float, float, float]) -> None:
    latency_s, bandwidth, wake_s, work = link
    chosen = choose_bucket_bytes(gradient_bytes, lambda n: latency_s + n / bandwidth, lambda n: wake_s + n / work)
    assert chosen % 100_000 == 0
    possible = range(1, max(1, min(512, gradient_bytes // (1 << 16))) + 1)
    costs = {buckets: cost(gradient_bytes, buckets, *link) for buckets in possible}
    # an eighth on top, and round numbers: of the counts that lead to this size one is the best
    nearest = [b for b in possible if abs(gradient_bytes / b * 9 / 8 - chosen) <= 100_000 + 9 / 8]
    assert nearest
    assert min(costs[b] for b in nearest) <= min(costs.values()) * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize(("gradient_bytes", "bandwidth", "latency_s"), [(10**8, 1.25e7, 1e-3), (10**9, 1e10, 1e-4)])
def test_where_hiding_is_free_it_is_the_root_of_bytes_bandwidth_and_latency(
    gradient_bytes: int, bandwidth: float, latency_s: float
) -> None:
    chosen = choose_bucket_bytes(gradient_bytes, lambda n: latency_s + n / bandwidth, lambda n: n / FREE)
    assert chosen == pytest.approx(9 / 8 * math.sqrt(gradient_bytes * bandwidth * latency_s), rel=0.1)


def test_where_the_ranks_own_cores_move_the_bytes_there_are_few() -> None:
    """36 MB of gradients between two ranks of one host: two buckets, of which the first is the larger."""
    for backend in ("shm", "gloo"):
        assert count(36_000_000, usual_bucket_bytes(36_000_000, 2, backend)) == 2


def test_small_models_have_one_bucket_and_an_unknown_backend_is_taken_for_gloo() -> None:
    assert usual_bucket_bytes(0, 2, "shm") == usual_bucket_bytes(1000, 2, "shm") == 100_000
    assert usual_bucket_bytes(10**9, 4, "rings of rings") == usual_bucket_bytes(10**9, 4, "gloo")


def test_exposed_is_the_last_bucket_or_what_the_link_cannot_carry_in_time() -> None:
    def second_a_megabyte(nbytes: int) -> float:
        return nbytes / 1e6

    assert exposed_s(10**7, 10**6, 1000.0, second_a_megabyte) == pytest.approx(1.0), "all but the last are hidden"
    assert exposed_s(10**7, 10**6, 4.0, second_a_megabyte) == pytest.approx(10 - 4 * 0.9), "the link is always busy"
    assert exposed_s(10**7, 10**8, 4.0, second_a_megabyte) == pytest.approx(10.0), "one bucket hides nothing"


DEVICE = Device(kind="cpu", memory_bytes=1)
ROWS = ((1000, 1e-3), (10**6, 2e-3), (10**8, 0.2))


def machines(*calibrations: Calibration) -> Cluster:
    link = Link(latency_s=1e-4, bandwidth=1e9)
    return Cluster(nodes=(Node(devices=(DEVICE,) * 4, link=link),), calibrations=calibrations)


def test_measured_collectives_come_before_the_link() -> None:
    measured = Calibration(backend="gloo", ranks=2, collectives={"all_reduce": ROWS})
    assert all_reduce_seconds(machines(measured), 2)(10**6) == pytest.approx(2e-3)
    ring = ring_seconds(2, Link(latency_s=1e-4, bandwidth=1e9))(10**6)
    assert ring == pytest.approx(2e-4 + 1e-3)
    assert all_reduce_seconds(machines(), 2)(10**6) == pytest.approx(ring)
    pairs_only = Calibration(backend="gloo", ranks=2)
    assert all_reduce_seconds(machines(pairs_only), 2)(10**6) == pytest.approx(ring)


def test_other_numbers_of_ranks_are_carried_over_as_a_ring_would_be() -> None:
    """With the figures of a ring of 2 those of a ring of 4 come out."""
    link = Link(latency_s=1e-4, bandwidth=1e9)
    rows = tuple((size, ring_seconds(2, link)(size)) for size in (1, 10**6, 10**8))
    measured = Calibration(backend="gloo", ranks=2, collectives={"all_reduce": rows})
    assert all_reduce_seconds(machines(measured), 4)(10**7) == pytest.approx(ring_seconds(4, link)(10**7), rel=1e-3)


def test_the_cluster_says_how_large_buckets_are() -> None:
    slow = Calibration(backend="gloo", ranks=2, collectives={"all_reduce": ((1, 1e-3), (10**8, 8.0))})
    assert bucket_bytes(36_000_000, machines(slow), 2) < 2_000_000, "a slow network hides well"


def test_between_nodes_a_host_sends_its_gradients_once() -> None:
    near, far = Link(latency_s=1e-5, bandwidth=1e10), Link(latency_s=1e-4, bandwidth=1e8)
    pairs = Cluster(nodes=(Node(devices=(DEVICE,) * 2, link=near),) * 2, between=far)
    singles = Cluster(nodes=(Node(devices=(DEVICE,), link=near),) * 4, between=far)
    n = 10**8
    assert all_reduce_seconds(pairs, 4)(n) == pytest.approx(n / 1e8 + 2 * n / 1e10, rel=0.01)
    assert all_reduce_seconds(singles, 4)(n) == pytest.approx(1.5 * n / 1e8, rel=0.01)
    assert all_reduce_seconds(singles, 4)(n) <= ring_seconds(4, far)(n)
    assert all_reduce_seconds(pairs, 2)(n) == pytest.approx(2 * n / 1e10, rel=0.01), "two ranks fit on one host"
