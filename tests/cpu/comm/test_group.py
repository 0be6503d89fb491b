"""`Group`: the operations, the limits and the abort, against plain arithmetic and with torch's own parallel modules."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardwise.comm.collectives import broadcast_all, gather_bytes, gather_rows
from shardwise.comm.group import Group
from shardwise.comm.kernel import library
from shardwise.errors import CommError, SpecError
from shardwise.spec.plan import Plan
from tests.cpu.comm.names import all_gather_single, reduce_scatter_single
from tests.ranks import Rank, RankFailed, run_ranks


@pytest.fixture(autouse=True, params=["gloo", "shm", "shm-torch"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks inherit it."""
    if request.param == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    monkeypatch.setenv("SHARDWISE_TRANSPORT", request.param)


def group_of(rank: Rank, **settings: Any) -> Group:
    group = rank.mesh(**settings).axis("data").group
    assert group is not None
    return group


def operations(rank: Rank) -> dict[str, Any]:
    mesh = rank.mesh()
    me, n = rank.rank, rank.world
    found: dict[str, Any] = {}
    summed = torch.full((3,), float(me + 1))
    dist.all_reduce(summed)
    found["all_reduce"] = summed.tolist()
    averaged = torch.full((2,), float(me))
    dist.all_reduce(averaged, op=dist.ReduceOp.AVG)
    found["average"] = averaged.tolist()
    sent = torch.arange(2.0) if me == 1 else torch.zeros(2)
    dist.broadcast(sent, 1)
    found["broadcast"] = sent.tolist()
    gathered = [torch.zeros(1) for _ in range(n)]
    dist.all_gather(gathered, torch.tensor([float(me)]))
    found["all_gather"] = [float(t) for t in gathered]
    flat = torch.empty(2 * n)
    all_gather_single(flat, torch.full((2,), float(me)))
    found["all_gather_single"] = flat.tolist()
    piece = torch.empty(1)
    reduce_scatter_single(piece, torch.arange(float(n)))
    found["reduce_scatter_single"] = piece.tolist()
    out = [torch.zeros(1) for _ in range(n)]
    dist.all_to_all(out, [torch.tensor([float(10 * me + r)]) for r in range(n)])
    found["all_to_all"] = [float(t) for t in out]
    uneven = torch.empty(n * (me + 1))
    dist.all_to_all_single(
        uneven, torch.cat([torch.full((r + 1,), float(me)) for r in range(n)]), [me + 1] * n, list(range(1, n + 1))
    )
    found["uneven"] = uneven.tolist()
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": me})
    found["objects"] = objects
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, torch.tensor([float(me)]), (me + 1) % n),
            dist.P2POp(dist.irecv, ring := torch.empty(1), (me - 1) % n),
        ]
    )
    for work in works:
        work.wait()
    found["ring"] = ring.tolist()
    dist.barrier()
    found["wire"] = mesh.wire()["all_reduce"]
    mesh.close()
    found["closed"] = not dist.is_initialized()
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_operations_agree_with_arithmetic(n: int) -> None:
    for me, found in enumerate(run_ranks(n, operations)):
        assert found["all_reduce"] == [n * (n + 1) / 2] * 3
        assert found["average"] == pytest.approx([(n - 1) / 2] * 2)
        assert found["broadcast"] == [0.0, 1.0]
        assert found["all_gather"] == [float(r) for r in range(n)]
        assert found["all_gather_single"] == [float(r) for r in range(n) for _ in range(2)]
        assert found["reduce_scatter_single"] == [float(n * me)]
        assert found["all_to_all"] == [float(10 * r + me) for r in range(n)]
        assert found["uneven"] == [float(r) for r in range(n) for _ in range(me + 1)]
        assert found["objects"] == [{"rank": r} for r in range(n)]
        assert found["ring"] == [float((me - 1) % n)]
        assert found["wire"] == (2, 4 * 3 + 4 * 2)
        assert found["closed"]


def uneven_gathers(rank: Rank) -> tuple[list[bytes], list[list[float]], list[Any]]:
    group = group_of(rank)
    said = gather_bytes(b"x" * rank.rank, group)
    rows = gather_rows(torch.full((rank.rank, 2), float(rank.rank)), list(range(rank.world)), group).tolist()
    mine = [torch.full((2,), float(rank.rank)), torch.tensor([rank.rank == 1]), torch.tensor(rank.rank)]
    broadcast_all(mine, group, root=1)
    return said, rows, [t.tolist() for t in mine]


def test_uneven_gathers_and_mixed_broadcasts() -> None:
    for said, rows, sent in run_ranks(3, uneven_gathers):
        assert said == [b"", b"x", b"xx"]
        assert rows == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert sent == [[1.0, 1.0], [True], 1]


def aborted_in_wait(rank: Rank) -> tuple[float, str, str]:
    group = group_of(rank)
    group.step = 7
    if rank.rank == 1:
        time.sleep(0.5)
        return 0.0, "", ""
    at = [0.0]

    def abort() -> None:
        time.sleep(0.3)
        at[0] = time.monotonic()
        group.abort()

    threading.Thread(target=abort).start()
    with pytest.raises(CommError) as first:
        group.all_reduce(torch.ones(4)).wait()
    freed_s = time.monotonic() - at[0]
    with pytest.raises(CommError) as second:
        group.all_reduce(torch.ones(4))
    return freed_s, str(first.value), str(second.value)


def test_abort_frees_a_waiting_caller_and_forbids_another_use() -> None:
    freed_s, first, second = run_ranks(2, aborted_in_wait)[0]
    assert 0 <= freed_s < 0.2
    assert "all_reduce number 1" in first
    assert "step 7" in first
    assert "never used again" in second


def abort_frees_the_peer(rank: Rank) -> tuple[float, str]:
    group = group_of(rank)
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
    waited_s, text = run_ranks(2, abort_frees_the_peer)[1]
    assert waited_s < 2
    assert "the test says so" in text


def late(rank: Rank) -> str:
    group = group_of(rank, timeout_s=0.5)
    if rank.rank == 1:
        time.sleep(1.7)
        return ""
    group.all_reduce(torch.ones(1))
    with pytest.raises(CommError) as caught:
        group.broadcast([torch.ones(1)], root=1).wait()
    return str(caught.value)


def test_a_wait_beyond_the_limit_names_the_operation_and_whom_it_waited_for() -> None:
    text = run_ranks(2, late)[0]
    assert "broadcast number 2" in text
    assert "0.5 s" in text
    assert "rank(s) 1" in text


def late_message(rank: Rank) -> tuple[list[float], str]:
    group = group_of(rank, timeout_s=1.0)
    got = torch.zeros(2)
    if rank.rank == 0:
        time.sleep(0.5)
        group.send([torch.ones(2)], 1, 3).wait()
        time.sleep(1.5)
        return [], ""
    group.recv([got], 0, 3).wait()
    with pytest.raises(CommError) as caught:
        group.recv([got], 0, 3).wait()
    return got.tolist(), str(caught.value)


def test_a_message_may_be_late_and_one_that_never_comes_names_its_sender() -> None:
    got, text = run_ranks(2, late_message)[1]
    assert got == [1.0, 1.0]
    assert "recv number 2" in text
    assert "timeout of 1 s" in text


def message_from_the_dead(rank: Rank) -> tuple[float, str]:
    group = group_of(rank)
    if rank.rank == 0:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(CommError) as caught:
        group.recv([torch.zeros(1)], 0).wait()
    return time.monotonic() - began, str(caught.value)


def test_waiting_for_a_message_of_a_rank_that_dies_ends_at_once() -> None:
    waited_s, text = run_ranks(2, message_from_the_dead, may_die=(0,))[1]
    assert waited_s < 2.5, "0.3 s until it died, and the reasons of the others are asked for 1 s"
    assert "recv" in text


def widowed(rank: Rank, scatter: bool = False) -> tuple[float, str]:
    group = group_of(rank)
    group.all_reduce(torch.ones(1)).wait()
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        for _ in range(1000):
            if scatter:
                group.reduce_scatter_single(torch.ones(1), torch.ones(rank.world)).wait()
            group.all_reduce(torch.ones(1)).wait()
    except CommError as error:
        return time.monotonic() - began, str(error)
    raise AssertionError("the dead rank answered")


@pytest.mark.parametrize("scatter", [False, True])
def test_a_dead_peer_is_an_error_on_every_rank_and_no_hang(scatter: bool) -> None:
    found = run_ranks(3, widowed, scatter, may_die=(1,))
    for rank in (0, 2):
        waited_s, text = found[rank]
        assert waited_s < 3
        assert ("reduce_scatter" if scatter else "all_reduce") in text


def from_many_threads(rank: Rank) -> list[float]:
    group = group_of(rank)
    tensors = [torch.full((1000,), float(i)) for i in range(20)]
    started = threading.Barrier(2)
    works: list[Any] = [None] * 20

    def send(half: range) -> None:
        started.wait()
        for i in half:
            works[i] = group.all_reduce(tensors[i])

    sender = threading.Thread(target=send, args=(range(10),))
    sender.start()
    started.wait()
    sender.join()
    send_rest = range(10, 20)
    for i in send_rest:
        works[i] = group.all_reduce(tensors[i])
    for work in works:
        work.wait()
    return [float(t[0]) for t in tensors]


def test_operations_of_several_threads_have_one_order() -> None:
    assert run_ranks(2, from_many_threads) == [[2.0 * i for i in range(20)]] * 2


def loopback_only(rank: Rank) -> list[str]:
    os.environ["SHARDWISE_TRANSPORT"] = "gloo"  # shared memory opens no socket at all
    mesh = rank.mesh()
    mine = {os.readlink(f"/proc/self/fd/{f}")[8:-1] for f in os.listdir("/proc/self/fd") if _is_socket(f)}
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as lines:
            for line in list(lines)[1:]:
                words = line.split()
                if words[9] in mine and words[3] == "0A":
                    found.append(words[1].split(":")[0])
    dist.barrier()
    mesh.close()
    return found


def _is_socket(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket")
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux's /proc")
def test_nothing_listens_beyond_loopback() -> None:
    for listening in run_ranks(2, loopback_only):
        assert listening
        assert set(listening) <= {"0100007F"}


def test_one_rank_needs_no_group_and_no_store() -> None:
    (found,) = run_ranks(1, lambda rank: (rank.mesh().axis("data").group, rank.mesh().wire(), dist.is_initialized()))
    assert found == (None, {}, False)


def test_a_plan_of_another_size_is_refused() -> None:
    with pytest.raises(RankFailed, match="SpecError: the plan data=3 has 3 ranks but 2 were started"):
        run_ranks(2, lambda rank: rank.mesh(Plan(data=3)))


def axes(rank: Rank) -> dict[str, Any]:
    mesh = rank.mesh(Plan(data=2, tensor=2))
    found = {}
    for name in ("data", "tensor"):
        axis = mesh.axis(name)
        assert axis.group is not None
        mine = torch.tensor([float(rank.rank)])
        axis.group.all_reduce(mine).wait()
        found[name] = (axis.rank, axis.size, float(mine))
    with pytest.raises(SpecError, match="no axis"):
        mesh.axis("row")
    mesh.close()
    return found


def test_every_axis_has_the_ranks_that_differ_on_it_only() -> None:
    found = run_ranks(4, axes)
    assert [f["tensor"] for f in found] == [(0, 2, 1.0), (1, 2, 1.0), (0, 2, 5.0), (1, 2, 5.0)]
    assert [f["data"] for f in found] == [(0, 2, 2.0), (0, 2, 4.0), (1, 2, 2.0), (1, 2, 4.0)]


def reconnected(rank: Rank) -> list[float]:
    found = []
    for generation in range(3):
        group = group_of(rank, generation=generation)
        tensor = torch.ones(1)
        group.all_reduce(tensor).wait()
        found.append(float(tensor))
        assert rank.store is not None
        rank.store.set(f"done/{generation}/{rank.rank}", "")  # a barrier of the group would end, on a slow rank, by the
        rank.store.wait([f"done/{generation}/{r}" for r in range(rank.world)])  # abort of one that is past it
        group.abort()
        dist.destroy_process_group()
    return found


def test_ranks_connect_anew_on_the_same_store_after_an_abort() -> None:
    assert run_ranks(2, reconnected) == [[2.0] * 3] * 2


# torch's own parallel modules over a Group, each against one process.


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def whole_gradient(x: torch.Tensor) -> list[torch.Tensor]:
    net = small_net()
    net(x).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def inputs() -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def ddp(rank: Rank) -> bool:
    mesh = rank.mesh()
    net = nn.parallel.DistributedDataParallel(small_net())
    for _ in range(2):
        net.zero_grad()
        net(inputs().chunk(rank.world)[rank.rank]).square().mean().backward()
    close = all(torch.allclose(p.grad, g) for p, g in zip(net.parameters(), whole_gradient(inputs()), strict=True))
    mesh.close()
    return close


def tensor_parallel(rank: Rank) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = rank.mesh()
    net = small_net()
    parallelize_module(net, init_device_mesh("cpu", (rank.world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    net(inputs()).square().mean().backward()
    expected = whole_gradient(inputs())
    close = all(torch.allclose(p.grad.full_tensor(), g) for p, g in zip(net.parameters(), expected, strict=True))
    mesh.close()
    return close


def fully_sharded(rank: Rank) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = rank.mesh()
    net = small_net()
    devices = init_device_mesh("cpu", (rank.world,))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=devices)
    fully_shard(net, mesh=devices)
    net(inputs().chunk(rank.world)[rank.rank]).square().mean().backward()
    expected = whole_gradient(inputs())
    close = all(torch.allclose(p.grad.full_tensor(), g) for p, g in zip(net.parameters(), expected, strict=True))
    mesh.close()
    return close


def pipeline(rank: Rank) -> bool:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    mesh = rank.mesh()
    net = small_net()
    own = net[:2] if rank.rank == 0 else net[2:]
    stage = PipelineStage(own, rank.rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=lambda output, target: (output - target).square().mean())
    if rank.rank == 0:
        schedule.step(inputs())
    else:
        schedule.step(target=torch.zeros(8, 4))
    expected = whole_gradient(inputs())
    mine = expected[:2] if rank.rank == 0 else expected[2:]
    close = all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(own.parameters(), mine, strict=True))
    mesh.close()
    return close


@pytest.mark.parametrize("user", [ddp, tensor_parallel, fully_sharded, pipeline], ids=lambda f: f.__name__)
def test_torch_parallel_modules_compute_what_one_process_computes(user: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        assert run_ranks(2, user) == [True, True]


@pytest.mark.slow
def test_ddp_and_its_group_end_without_a_hang() -> None:
    """It hung in one of 2 to 70 runs, where the cores had other work, when DDP was the last to hold gloo's backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(100):
            assert run_ranks(2, ddp, timeout_s=20) == [True, True]


def interface(rank: Rank, name: str) -> list[str]:
    os.environ["GLOO_SOCKET_IFNAME"] = name
    mesh = rank.mesh()
    dist.barrier()
    mesh.close()
    return [name]


@pytest.mark.skipif(not Path("/sys/class/net/lo").exists(), reason="the loopback interface has another name here")
def test_gloo_listens_on_the_interface_that_the_variable_names(transport: None, monkeypatch: Any) -> None:
    monkeypatch.setenv("SHARDWISE_TRANSPORT", "gloo")
    assert run_ranks(2, interface, "lo") == [["lo"], ["lo"]]
    with pytest.raises(RankFailed, match="gloo cannot listen on no-such-interface: .*GLOO_SOCKET_IFNAME"):
        run_ranks(2, interface, "no-such-interface")
