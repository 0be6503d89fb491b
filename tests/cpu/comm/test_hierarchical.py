"""Groups that span hosts: the same numbers as gloo, fewer bytes between hosts, one order, errors that name the rank."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from shardwise.comm.group import Group
from shardwise.comm.hierarchical import Hierarchical
from shardwise.comm.kernel import library
from shardwise.comm.store import HOST
from shardwise.errors import CommError
from tests.cpu.comm.test_group import ddp, fully_sharded, operations, pipeline, tensor_parallel
from tests.cpu.comm.test_shm import OPERATIONS, perform
from tests.examples import examples
from tests.ranks import Rank, run_ranks

pytestmark = pytest.mark.skipif(library() is None, reason="built without a C compiler")


def on_host(rank: Rank, layout: str) -> None:
    """Rank r is on the host that letter r of the layout names."""
    os.environ[HOST] = layout[rank.rank]


def group_of(rank: Rank, layout: str, **more: Any) -> Group:
    on_host(rank, layout)
    group = rank.mesh(**more).axis("data").group
    assert group is not None
    assert isinstance(backend_of(group), Hierarchical)
    return group


def backend_of(group: Group) -> Any:
    return group._inners["cpu"].backend


# The same numbers as gloo.


def compare(rank: Rank, layout: str, cases: list[dict[str, Any]]) -> tuple[list[str], list[bytes]]:
    """What differs from gloo, and the bits of every all-reduce."""
    ours = group_of(rank, layout)
    gloo = dist.new_group(backend="gloo")
    wrong, bits = [], []
    for case in cases:
        backend_of(ours).form, backend_of(ours).paths.only = case["form"], case["only"]
        pairs = list(zip(perform(ours, case, rank), perform(gloo, case, rank), strict=True))
        for mine, theirs in pairs:
            rough = case["dtype"] in (torch.bfloat16, torch.float16)
            close = dict(rtol=5e-2, atol=5e-2) if rough else dict(rtol=1e-5, atol=1e-5)
            if not torch.allclose(mine.double(), theirs.double(), **close):
                wrong.append(f"{case}: {mine} but {theirs}")
            if case["op"] == "all_reduce":
                bits.append(mine.view(torch.uint8).numpy().tobytes())
    return wrong, bits


def check(layout: str, cases: list[dict[str, Any]]) -> None:
    found = run_ranks(len(layout), compare, layout, cases)
    assert [wrong for wrong, _ in found] == [[]] * len(layout)
    assert all(bits == found[0][1] for _, bits in found), "the ranks have different bits"


CASES = st.fixed_dictionaries(
    {
        "op": st.sampled_from(OPERATIONS),
        "numel": st.sampled_from([0, 1, 3, 64, 1000, 70_001]),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.uint8]),
        "reduction": st.sampled_from(["SUM", "PRODUCT", "MIN", "MAX"]),
        "root": st.integers(0, 4),
        "seed": st.integers(0, 50),
        "form": st.sampled_from([None, "columns", "leader"]),
        "only": st.sampled_from([None, "ring", "flat", "halving_doubling"]),
    }
)


@pytest.mark.parametrize("layout", ["AABB", "ABAB", "AABBB", "AB", "ABC"])
def test_every_operation_agrees_with_gloo(layout: str) -> None:
    forms = ["columns", "leader", None] if len(set(map(layout.count, layout))) == 1 else ["leader", None]
    case = {"numel": 1003, "dtype": torch.float32, "reduction": "SUM", "root": 1, "seed": 3, "only": None}
    check(layout, [case | {"op": op, "form": form} for op in OPERATIONS for form in forms])


@examples(10)
@given(cases=st.lists(CASES, min_size=8, max_size=14), layout=st.sampled_from(["AABB", "ABBA", "ABC", "ABCAB"]))
def test_random_tensors_and_operations_agree_with_gloo(cases: list[dict[str, Any]], layout: str) -> None:
    uneven = layout == "ABCAB"
    check(layout, [case | {"form": None} if uneven and case["form"] == "columns" else case for case in cases])


def special(rank: Rank) -> dict[str, Any]:
    group = group_of(rank, "AABB")
    me = rank.rank
    found: dict[str, Any] = {}
    whole = torch.arange(12.0).view(3, 4).t() + me  # its memory is in another order
    dist.all_reduce(whole)
    found["strided"] = whole.tolist()
    waves = torch.full((3,), 1j * (me + 1))
    dist.all_reduce(waves)
    found["complex"] = [waves.real.tolist(), waves.imag.tolist()]
    for name, op in (("average", dist.ReduceOp.AVG), ("scaled", dist._make_nccl_premul_sum(0.5))):
        mine = torch.full((5,), float(me))
        dist.all_reduce(mine, op=op)
        found[name] = mine.tolist()
    with torch.inference_mode():
        made = torch.full((4,), float(me))
        dist.all_reduce(made)
        found["inference"] = made.tolist()
    kept = torch.full((3,), float(me))
    dist.reduce(kept, 2)
    found["reduced"] = kept.tolist()
    pieces = [torch.zeros(r + 1) for r in range(4)]  # gloo cannot do this
    dist.all_gather(pieces, torch.full((me + 1,), float(me)))
    found["uneven"] = [piece.tolist() for piece in pieces]
    with pytest.raises(CommError, match="any source"):
        group.recv_anysource([torch.zeros(1)])
    with pytest.raises(ValueError, match="cannot be 4 pieces"):
        group.all_gather_single(torch.zeros(7), torch.zeros(2))
    with pytest.raises(ValueError, match="takes integers"):
        group.all_reduce(torch.ones(2), dist.ReduceOp.BAND)
    return found


def test_other_tensors_and_reductions() -> None:
    for me, found in enumerate(run_ranks(4, special)):
        assert found["strided"] == (torch.arange(12.0).view(3, 4).t() * 4 + 6).tolist()
        assert found["complex"] == [[0.0] * 3, [10.0] * 3]
        assert found["average"] == [1.5] * 5
        assert found["scaled"] == [3.0] * 5
        assert found["inference"] == [6.0] * 4
        assert found["reduced"] == [6.0 if me == 2 else float(me)] * 3
        assert found["uneven"] == [[float(r)] * (r + 1) for r in range(4)]


@pytest.mark.parametrize("layout", ["AB", "ABB"])
def test_operations_and_messages_agree_with_arithmetic(layout: str) -> None:
    def placed(rank: Rank) -> dict[str, Any]:
        on_host(rank, layout)
        return operations(rank)

    n = len(layout)
    for me, found in enumerate(run_ranks(n, placed)):
        assert found["all_reduce"] == [n * (n + 1) / 2] * 3
        assert found["uneven"] == [float(r) for r in range(n) for _ in range(me + 1)]
        assert found["objects"] == [{"rank": r} for r in range(n)]
        assert found["ring"] == [float((me - 1) % n)]


@pytest.mark.parametrize("user", [ddp, tensor_parallel, fully_sharded], ids=lambda f: f.__name__)
def test_torch_parallel_modules_compute_what_one_process_computes(user: Any) -> None:
    def placed(rank: Rank) -> bool:
        on_host(rank, "AABB")
        return bool(user(rank))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        assert run_ranks(4, placed) == [True] * 4


def test_a_pipeline_between_hosts_computes_what_one_process_computes() -> None:
    def placed(rank: Rank) -> bool:
        on_host(rank, "AB")
        return pipeline(rank)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(2, placed) == [True, True]


# What it costs.


def bytes_between(rank: Rank, layout: str, form: str | None) -> dict[str, int]:
    group = group_of(rank, layout)
    backend = backend_of(group)
    backend.form = form
    found = {}
    n = 80_000
    calls = {
        "all_reduce": lambda: group.all_reduce(torch.ones(n)),
        "broadcast": lambda: group.broadcast([torch.ones(n)], root=3),
        "reduce": lambda: group.reduce([torch.ones(n)]),
        "all_gather": lambda: group.all_gather_single(torch.empty(n), torch.ones(n // rank.world)),
        "reduce_scatter": lambda: group.reduce_scatter_single(torch.empty(n // rank.world), torch.ones(n)),
    }
    for name, call in calls.items():
        before = sum(wire.sent for wire in backend.paths.wires)
        call().wait()
        found[name] = sum(wire.sent for wire in backend.paths.wires) - before
    return found


@pytest.mark.parametrize("form", ["columns", "leader"])
def test_what_leaves_a_host_leaves_it_once(form: str) -> None:
    """Of two hosts each sends a tensor once; a ring over the four ranks would send it one and a half times."""
    found = run_ranks(4, bytes_between, "AABB", form)
    n, a_look = 80_000 * 4, 64  # ranks may agree on how long a transfer took
    for host in (found[:2], found[2:]):
        assert n <= sum(each["all_reduce"] for each in host) <= n + a_look
        assert n // 2 <= sum(each["all_gather"] for each in host) <= n // 2 + a_look
        assert n // 2 <= sum(each["reduce_scatter"] for each in host) <= n // 2 + a_look
    assert n <= sum(each["broadcast"] for each in found) <= n + a_look
    assert n <= sum(each["reduce"] for each in found) <= n + a_look
    assert found[3]["broadcast"] >= n, "the root speaks for its host"


def in_order(rank: Rank) -> list[float]:
    group = group_of(rank, "AABB")
    tensors = [torch.full((1000 * (i + 1),), float(i)) for i in range(30)]
    works = [group.all_reduce(tensor) for tensor in tensors]
    works.append(group.broadcast([tensors[0]], root=1))
    for work in reversed(works):
        work.wait()
    return [float(tensor[-1]) for tensor in tensors]


def test_operations_run_in_the_order_in_which_they_were_started() -> None:
    assert run_ranks(4, in_order) == [[4.0 * i for i in range(30)]] * 4


def measured(rank: Rank) -> tuple[float, list[Any]]:
    began = time.perf_counter()
    group = group_of(rank, "AABB")
    return time.perf_counter() - began, [tuple(path) for path in backend_of(group).paths.paths]


def test_links_are_measured_quickly_and_alike() -> None:
    found = run_ranks(4, measured)
    assert all(paths == found[0][1] for _, paths in found)
    (path,) = found[0][1]
    assert 1e-6 < path[0] < 0.1
    assert 1e6 < path[1] < 1e12
    assert max(took for took, _ in found) < 3


# What goes wrong.


def widowed(rank: Rank, layout: str, victim: int, between: bool) -> tuple[float, str]:
    group = group_of(rank, layout)
    group.all_reduce(torch.ones(1)).wait()
    if rank.rank == victim:
        if between:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            group.all_reduce(torch.ones(500_000)).wait()
    except CommError as error:
        return time.monotonic() - began, str(error)


@pytest.mark.parametrize("between", [False, True], ids=["idle", "amid"])
@pytest.mark.parametrize(("layout", "victim"), [("AABB", 3), ("AABB", 0), ("ABC", 1)])
def test_a_dead_rank_is_an_error_on_every_rank(layout: str, victim: int, between: bool) -> None:
    found = run_ranks(len(layout), widowed, layout, victim, between, may_die=(victim,))
    for rank, each in enumerate(found):
        if rank != victim:
            waited_s, text = each
            assert waited_s < 4
            assert "all_reduce" in text
            assert f"ank {victim} " in text or f"ank(s) {victim} " in text or f", {victim} " in text, text


def aborted(rank: Rank) -> tuple[float, str]:
    group = group_of(rank, "AABB")
    began = time.monotonic()
    if rank.rank == 0:
        time.sleep(0.3)
        group.abort("the test says so")
        time.sleep(0.5)
        return 0.0, ""
    with pytest.raises(CommError) as caught:
        group.all_reduce(torch.ones(4)).wait()
    return time.monotonic() - began, str(caught.value)


def test_abort_on_one_rank_ends_the_wait_of_the_others() -> None:
    for waited_s, text in run_ranks(4, aborted)[1:]:
        assert waited_s < 2
        assert "the test says so" in text


def late(rank: Rank) -> str:
    group = group_of(rank, "AABB", timeout_s=1.0)
    if rank.rank == 3:
        time.sleep(2.5)
        return ""
    with pytest.raises(CommError) as caught:
        group.all_reduce(torch.ones(1)).wait()
    return str(caught.value)


def test_a_wait_has_the_groups_limit() -> None:
    found = run_ranks(4, late)
    assert any("longer than its timeout of 1 s" in text for text in found[:3])
    assert all("all_reduce number 1" in text for text in found[:3])


def reconnected(rank: Rank) -> list[float]:
    found = []
    on_host(rank, "AABB")
    for generation in range(3):
        mesh = rank.mesh(generation=generation)
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        found.append(float(tensor))
        dist.barrier()
        mesh.close()
    found.append(sum(thread.name == "collectives between hosts" for thread in threading.enumerate()))
    return found


def test_ranks_connect_anew_and_leave_no_thread_behind() -> None:
    assert run_ranks(4, reconnected) == [[4.0, 4.0, 4.0, 0]] * 4


def late_message(rank: Rank) -> list[float]:
    group = group_of(rank, "AB")
    tensor = torch.full((2,), float(rank.rank))
    if rank.rank == 0:
        time.sleep(0.5)
        group.send([tensor], 1).wait()
    else:
        group.recv([tensor], 0).wait()
    return tensor.tolist()


def test_a_late_message_is_waited_for() -> None:
    """gloo closes its connections when a wait for a message runs out."""
    assert run_ranks(2, late_message) == [[0.0, 0.0]] * 2
