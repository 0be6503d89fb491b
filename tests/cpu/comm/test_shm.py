"""`Shm` beside gloo: the same operations give the same tensors; what goes wrong is an error that names the rank."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from shardwise.comm.kernel import library
from shardwise.comm.shm import CHUNK
from shardwise.comm.torch_segment import PIPE
from shardwise.errors import CommError
from tests.cpu.comm.names import all_gather_single, reduce_scatter_single
from tests.cpu.comm.operations import OPERATIONS, data, perform, shm_of
from tests.ranks import Rank, run_ranks


@pytest.fixture(autouse=True, scope="module", params=["shm", "shm-torch"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernel and the path without it; forked ranks inherit it."""
    if request.param == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SHARDWISE_TRANSPORT", request.param)
        yield request.param


SIZES = [0, 1, 3, 64, 1000, 8191, 8193, CHUNK // 4, CHUNK // 4 + 7, 300_001]
REDUCED = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]


# The same numbers as gloo.


def compare(rank: Rank, cases: list[dict[str, Any]]) -> list[str]:
    ours = shm_of(rank)
    gloo = dist.new_group(backend="gloo")
    wrong = []
    for case in cases:
        for mine, theirs in zip(perform(ours, case, rank), perform(gloo, case, rank), strict=True):
            loose = case["dtype"] in (torch.bfloat16, torch.float16)
            if not torch.allclose(
                mine.double(), theirs.double(), rtol=2e-2 if loose else 1e-6, atol=2e-2 if loose else 1e-6
            ):
                wrong.append(f"{case}: {mine} but {theirs}")
    return wrong


CASES = st.fixed_dictionaries(
    {
        "op": st.sampled_from(OPERATIONS),
        "numel": st.sampled_from(SIZES),
        "dtype": st.sampled_from(REDUCED),
        "reduction": st.sampled_from(["SUM", "PRODUCT", "MIN", "MAX"]),
        "root": st.integers(0, 3),
        "seed": st.integers(0, 50),
    }
)


@settings(max_examples=12, deadline=None)
@given(n=st.integers(2, 4), cases=st.lists(CASES, min_size=8, max_size=16))
def test_every_operation_agrees_with_gloo(n: int, cases: list[dict[str, Any]]) -> None:
    for wrong in run_ranks(n, compare, cases):
        assert wrong == []


# What gloo cannot do, or does otherwise: against arithmetic.


def beyond(rank: Rank) -> dict[str, bool]:
    shm_of(rank)
    n, me = rank.world, rank.rank
    found: dict[str, bool] = {}
    for numel in (10, 40_000):
        mine = data(3, me, numel, torch.float32)
        every = [data(3, r, numel, torch.float32) for r in range(n)]
        total = functools.reduce(torch.add, every)
        average = mine.clone()
        dist.all_reduce(average, op=dist.ReduceOp.AVG)
        found[f"average {numel}"] = torch.equal(average, total / n)
        scaled = mine.clone()
        dist.all_reduce(scaled, op=dist._make_nccl_premul_sum(0.5))
        found[f"scaled {numel}"] = torch.equal(scaled, functools.reduce(torch.add, [0.5 * each for each in every]))
        truth = mine > 1
        dist.all_reduce(truth)
        found[f"bool {numel}"] = torch.equal(truth, functools.reduce(torch.logical_or, [each > 1 for each in every]))
        turned = torch.complex(mine, -mine)
        dist.all_reduce(turned)
        found[f"complex {numel}"] = torch.equal(turned, torch.complex(total, -total))
        wide = torch.zeros(numel, 3)
        wide[:, 1] = mine
        dist.all_reduce(wide[:, 1])
        found[f"strided {numel}"] = torch.equal(wide[:, 1], total) and not wide[:, 0].any()
        wide[:, 1] = mine
        dist.all_reduce(wide[:, 1], op=dist._make_nccl_premul_sum(2.0))
        doubled = functools.reduce(torch.add, [2 * each for each in every])
        found[f"strided scaled {numel}"] = torch.equal(wide[:, 1], doubled)
        both = torch.zeros(n * numel, 2)
        all_gather_single(both[:, 0], mine)
        found[f"strided all_gather {numel}"] = torch.equal(both[:, 0], torch.cat(every))
        place = torch.zeros(n * numel)
        place[me * numel : (me + 1) * numel] = mine
        all_gather_single(place, place[me * numel : (me + 1) * numel])
        found[f"all_gather in place {numel}"] = torch.equal(place, torch.cat(every))
        uneven = [torch.zeros(numel + r) for r in range(n)]
        dist.all_gather(uneven, data(4, me, numel + me, torch.float32))
        found[f"uneven all_gather {numel}"] = all(
            torch.equal(u, data(4, r, numel + r, torch.float32)) for r, u in enumerate(uneven)
        )
        nan = torch.full((numel,), float("nan") if me == n - 1 else 1.0)
        dist.all_reduce(nan, op=dist.ReduceOp.MAX)
        found[f"nan {numel}"] = bool(nan.isnan().all())
    weight = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last).weight
    with torch.no_grad():
        weight.fill_(float(me))
    dist.broadcast(weight, 1)
    found["a strided parameter"] = bool((weight == 1).all())
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_what_gloo_cannot_do(n: int) -> None:
    for found in run_ranks(n, beyond):
        assert all(found.values()), [name for name, right in found.items() if not right]


def wrong_calls(rank: Rank) -> list[str]:
    group = shm_of(rank)
    n, four, five = rank.world, torch.ones(4), torch.ones(5)
    calls = {
        "own piece": lambda: dist.all_to_all_single(
            torch.ones(4), four, [3, 1] if rank.rank else [2, 2], [1, 3] if rank.rank else [1, 3]
        ),
        "too few outputs": lambda: dist.all_gather([four], four),
        "own output": lambda: dist.all_gather([five] * n, four),
        "sizes": lambda: all_gather_single(five, four),
        "types": lambda: reduce_scatter_single(torch.ones(2, dtype=torch.bfloat16), four),
        "bits of floats": lambda: dist.all_reduce(four, op=dist.ReduceOp.BAND),
        "root": lambda: group.broadcast([four], root=n),
    }
    refused = []
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError, RuntimeError):
            refused.append(name)
    dist.all_reduce(four)
    return [*refused, str(float(four[0]))]


def test_calls_that_would_read_or_write_elsewhere_are_refused_and_leave_the_group_alive() -> None:
    names = ["own piece", "too few outputs", "own output", "sizes", "types", "bits of floats", "root"]
    assert run_ranks(2, wrong_calls) == [[*names, "2.0"]] * 2


def forks(rank: Rank) -> tuple[float, float]:
    """A child that ends in the ordinary way has copies of all our objects, and the same memory."""
    group = shm_of(rank)
    shared = group.zeros(50_000, torch.float32, torch.device("cpu"))
    shared.fill_(1.0)
    work = group.all_reduce(torch.ones(10))
    child = os.fork()
    if child == 0:
        del shared, work, group
        gc.collect()
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    work.wait()
    kept = float(shared.sum())
    group.all_reduce(shared).wait()
    return kept, float(shared[0])


def test_a_forked_child_leaves_the_group_of_its_parent_alone() -> None:
    assert run_ranks(2, forks) == [(50_000.0, 2.0)] * 2


def hooked(rank: Rank, hook: str) -> list[float]:
    shm_of(rank)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 30), nn.Linear(30, 5))
    # PowerSGD's hook starts collectives from callbacks, in no order that ranks share: it needs a single bucket.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=25 if hook == "powersgd" else 0.005)
    if hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(5):
        wrapped(data(step, rank.rank, 320, torch.float32).view(8, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [float(p.detach().sum()) for p in model.parameters()]


@pytest.mark.parametrize("hook", ["fp16", "powersgd"])
def test_hooks_of_ddp_get_their_futures(hook: str) -> None:
    first, second = run_ranks(2, hooked, hook)
    assert first == second


# Tensors in shared memory.


def in_place(rank: Rank) -> list[Any]:
    group = shm_of(rank)
    found: list[Any] = []
    for numel in (5, 50_000, 1_000_003):
        tensor = group.zeros(numel, torch.float32, torch.device("cpu"))
        assert float(tensor.abs().sum()) == 0
        values = data(7, rank.rank, numel, torch.float32)
        tensor.copy_(values)
        piece = tensor[1:]
        group.all_reduce(piece).wait()
        plain = values[1:].clone()
        group.all_reduce(plain).wait()
        found += [float(tensor[0]) == float(values[0]), torch.equal(piece, plain)]
    mixed = group.zeros(100_000, torch.float32, torch.device("cpu")) if rank.rank else torch.zeros(100_000)
    mixed += rank.rank
    group.all_reduce(mixed).wait()
    found.append(float(mixed[0]) == sum(range(rank.world)) and bool((mixed == mixed[0]).all()))
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_shared_tensors_give_the_same_bits(n: int) -> None:
    for found in run_ranks(n, in_place):
        assert found == [True] * 7


def reuse(rank: Rank) -> tuple[int, bool]:
    group = shm_of(rank)
    heap = group._inners["cpu"].backend.heap
    before = list(heap._free)
    for _ in range(3):
        views = [group.zeros(100_000, torch.float32, torch.device("cpu")).view(100, 1000)[2:] for _ in range(4)]
        views[0].fill_(3.0)
        del views
    again = group.zeros(100_000, torch.float32, torch.device("cpu"))
    clean = float(again.abs().sum()) == 0.0
    del again
    heap._take_back()  # what a finalizer noted
    return len(heap._free), heap._free == before and clean


def test_shared_memory_comes_back_and_is_zero_again() -> None:
    assert run_ranks(2, reuse) == [(1, True)] * 2


# Messages.


def exchange(rank: Rank) -> list[bool]:
    shm_of(rank)
    me, other = rank.rank, 1 - rank.rank
    big = torch.full((PIPE,), float(me))  # four times what the pipe holds, both ways at once
    into = torch.empty(PIPE)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, big, other), dist.P2POp(dist.irecv, into, other)])
    for work in works:
        work.wait()
    found = [bool((into == other).all())]
    if me == 0:
        sent = [dist.isend(torch.full((3,), float(tag)), 1, tag=tag) for tag in (1, 2, 3)]
        for each in sent:
            each.wait()
    else:
        time.sleep(0.05)
        for tag in (3, 1, 2):
            got = torch.empty(3)
            dist.recv(got, 0, tag=tag)
            found.append(float(got[0]) == tag)
    dist.barrier()
    return found


def test_messages_pass_each_other_and_find_their_tags() -> None:
    assert run_ranks(2, exchange) == [[True], [True] * 4]


def from_anybody(rank: Rank) -> list[int]:
    shm_of(rank)
    if rank.rank:
        dist.send(torch.tensor([float(rank.rank)]), 0)
        return []
    found = []
    for _ in range(rank.world - 1):
        got = torch.empty(1)
        source = dist.recv(got)
        found.append((source, int(got)))
    return [source for source, value in sorted(found) if source == value]


def test_a_message_from_anybody_says_from_whom() -> None:
    assert run_ranks(3, from_anybody)[0] == [1, 2]


Post = tuple[int, int, int, int]  # from, to, tag, elements


def post_office(rank: Rank, posts: list[Post], seed: int) -> list[int]:
    """Send all that this rank is to send, receive in another order, wait in a third."""
    group = shm_of(rank)
    draw = random.Random(seed)
    works, landed = [], []
    coming: dict[tuple[int, int], list[tuple[int, int]]] = {}  # of two with one tag the first that is sent lands first
    for number, (origin, target, tag, numel) in enumerate(posts):
        if origin == rank.rank:
            works.append(group.send([data(number, 0, numel, torch.float32)], target, tag))
        elif target == rank.rank:
            coming.setdefault((origin, tag), []).append((number, numel))
    order = [key for key, each in coming.items() for _ in each]
    draw.shuffle(order)
    for origin, tag in order:
        number, numel = coming[origin, tag].pop(0)
        into = torch.full((numel,), -1.0)
        landed.append((number, into))
        works.append(group.recv([into], origin, tag))
    draw.shuffle(works)
    for work in works:
        work.wait()
    return [number for number, into in landed if not torch.equal(into, data(number, 0, len(into), torch.float32))]


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 4), draw=st.randoms(use_true_random=False), seed=st.integers(0, 1000))
def test_messages_of_any_size_arrive_whole(n: int, draw: random.Random, seed: int) -> None:
    posts: list[Post] = []
    for _ in range(draw.randrange(1, 25)):
        origin, target = draw.sample(range(n), 2)
        posts.append(
            (origin, target, draw.randrange(3), draw.choice([0, 1, 3, 5000, PIPE // 4, PIPE // 4 - 3, 100_001]))
        )
    assert run_ranks(n, post_office, posts, seed) == [[]] * n


# What nobody waits for.


def unattended(rank: Rank) -> float:
    group = shm_of(rank)
    began = time.monotonic()
    tensor = torch.ones(3 * CHUNK)
    work = group.all_reduce(tensor)
    if rank.rank == 0:
        time.sleep(0.6)  # busy elsewhere: the helper takes part
        work.wait()
        return 0.0
    work.wait()
    return time.monotonic() - began


def test_an_operation_goes_on_while_its_owner_is_elsewhere() -> None:
    assert run_ranks(2, unattended)[1] < 0.4


def forgotten(rank: Rank) -> float:
    group = shm_of(rank)
    for _ in range(20):
        group.all_reduce(torch.ones(100_000))  # neither the work nor the tensor is kept
    last = torch.ones(1)
    group.all_reduce(last).wait()
    return float(last)


def test_tensors_of_forgotten_work_live_until_it_has_ended() -> None:
    assert run_ranks(2, forgotten) == [2.0, 2.0]


# Failure.


def disagreement(rank: Rank, what: str) -> str:
    group = shm_of(rank)
    odd = rank.rank == 1
    try:
        if what == "operation" and odd:
            group.broadcast([torch.ones(4)], root=0).wait()
        elif what == "root":
            group.broadcast([torch.ones(4)], root=int(odd)).wait()
            group.barrier().wait()
        elif what == "dtype":
            group.all_reduce(torch.ones(4, dtype=torch.float64 if odd else torch.float32)).wait()
        elif what == "reduction":
            group.all_reduce(torch.ones(4), dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM).wait()
        elif what == "uneven":
            rows = [1, 2] if odd else [2, 2]  # rank 0 sends 2 of them
            group.all_to_all_single(torch.empty(sum(rows)), torch.ones(4), rows, [2, 2]).wait()
        else:
            group.all_reduce(torch.ones(5 if odd else 4)).wait()
    except CommError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shape", ["all_reduce of 5 float32", "all_reduce of 4 float32"]),
        ("dtype", ["float64", "float32"]),
        ("operation", ["broadcast of 4 float32", "all_reduce of 4 float32"]),
        ("reduction", ["by max", "by sum"]),
        ("root", ["with root 0", "with root 1"]),
        ("uneven", ["sends 8 bytes", "expects"]),
    ],
)
def test_ranks_that_disagree_are_told_what_each_called(what: str, words: list[str]) -> None:
    for text in run_ranks(2, disagreement, what):
        assert "rank 0" in text
        assert "rank 1" in text
        assert all(word in text for word in words)


def run_ahead(rank: Rank) -> bool:
    """Roots that wait for nobody, readers that are late, and tensors that lie beside their header or in the ring."""
    group = shm_of(rank)
    counts = [1, 511, 512, 513, 700, 90_000, 3, 300_000, 2]  # of float32; 512 are the most that lie in a slot
    right = True
    for turn in range(25):
        if turn % 5 == rank.rank:
            time.sleep(0.02)  # the others meet their limit
        for number, count in enumerate(counts):
            root = (turn // 8 + number) % rank.world
            value = float(100 * turn + 10 * number)
            told = torch.full((count,), value + rank.rank)
            group.broadcast([told], root=root).wait()
            summed = torch.full((count,), value)
            dist.reduce(summed, root)
            right &= bool((told == value + root).all())
            right &= rank.rank != root or bool((summed == value * rank.world).all())
    small = torch.zeros(4)
    for number in range(100):  # three times round the slots
        small.fill_(float(number) if rank.rank == 0 else -1.0)
        group.broadcast([small], root=0).wait()
        right &= bool((small == number).all())
        if rank.rank == 1 and number % 40 == 0:
            time.sleep(0.02)
    return right


def test_ranks_that_run_ahead_overwrite_nothing() -> None:
    assert run_ranks(3, run_ahead) == [True] * 3


def apart(rank: Rank, what: str) -> str:
    """Rank 0 runs ahead and waits for nobody; then it does."""
    group = shm_of(rank)
    four = torch.ones(4)
    try:
        if what == "readers" and rank.rank:  # the root reads from neither of them
            group.broadcast([torch.ones(3 + rank.rank)], root=0).wait()
        elif what == "readers":
            group.broadcast([four], root=0).wait()
        else:
            if rank.rank == 2:
                time.sleep(0.1)
            for number in range(5):
                if number == 3 and rank.rank == 2:
                    group.gather([[torch.empty(4)] * 3], [four], _rooted(2)).wait()
                group.broadcast([four], root=0).wait()
        group.barrier().wait()
    except CommError as error:
        return str(error)
    return "nothing"


def _rooted(root: int) -> Any:
    options = dist.GatherOptions()
    options.rootRank = root
    return options


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("readers", ["broadcast of 5 float32", "broadcast of 4 float32"]),
        ("late", ["gather of 4 float32", "broadcast of 4 float32"]),
    ],
)
def test_ranks_that_run_ahead_are_told_of_what_others_called(what: str, words: list[str]) -> None:
    for text in run_ranks(3, apart, what):
        assert all(word in text for word in words), text


def killed(rank: Rank, held_bytes: int) -> tuple[float, str]:
    group = shm_of(rank)
    assert rank.store is not None
    if rank.rank == 1:
        memory = torch.ones(held_bytes // 4)
        rank.store.set("victim", f"{os.getpid()}")
        time.sleep(60)
        return float(memory[0]), ""
    rank.store.wait(["victim"])
    work = group.all_reduce(torch.ones(1000))
    if rank.rank == 0:
        time.sleep(0.1)
        rank.store.set("killed", repr(time.monotonic()))
        os.kill(int(rank.store.get("victim")), signal.SIGKILL)
    try:
        work.wait()
    except CommError as error:
        return time.monotonic() - float(rank.store.get("killed")), str(error)
    return 0.0, "no error"


@pytest.mark.parametrize("held", [0, 2 << 30])
def test_a_death_is_known_at_once_whatever_memory_it_held(held: int) -> None:
    delays = []
    for result in run_ranks(3, killed, held, may_die=(1,), patience_s=0.2):
        if result is not None:
            delays.append(result[0])
            assert "rank 1 died" in result[1]
    assert len(delays) == 2
    assert max(delays) < 0.1  # 20 ms where the cores are free


def left(rank: Rank) -> str:
    group = shm_of(rank)
    group.all_reduce(torch.ones(10)).wait()
    if rank.rank == 1:
        group.shutdown()
        return ""
    try:
        group.all_reduce(torch.ones(10)).wait()
    except CommError as error:
        return str(error)
    return "no error"


def test_who_left_is_missed_only_by_those_that_wait_for_it() -> None:
    assert "rank 1 left the group" in run_ranks(2, left)[0]


def no_trace(rank: Rank) -> bool:
    mesh = rank.mesh()
    dist.barrier()
    return any("memfd:shardwise" in line for line in open("/proc/self/maps")) and mesh is not None


def test_nothing_is_left_behind() -> None:
    before = set(os.listdir("/dev/shm"))
    assert run_ranks(2, no_trace) == [True, True]
    assert set(os.listdir("/dev/shm")) <= before


def random_death(rank: Rank, seed: int) -> str:
    """Operations at random until one rank kills itself at random, within one or between two."""
    group = shm_of(rank)
    draw = random.Random(seed)
    victim, last = draw.randrange(rank.world), draw.randrange(3, 30)
    mine = random.Random(seed * 10 + rank.rank)
    try:
        for step in range(1000):
            if rank.rank == victim and step == last:
                delay = mine.random() * 0.002
                pid = os.getpid()
                if os.fork() == 0:
                    time.sleep(delay)
                    os.kill(pid, signal.SIGKILL)
                    os._exit(0)
            kind, numel = (
                draw.choice(["all_reduce", "blocking", "all_gather", "shared"]),
                draw.choice([1, 1000, 200_000]),
            )
            if kind == "all_gather":
                whole = torch.empty(rank.world * numel)
                group.all_gather_single(whole, torch.full((numel,), float(rank.rank))).wait()
                assert all(bool((whole[r * numel : (r + 1) * numel] == r).all()) for r in range(rank.world))
                continue
            cpu = torch.device("cpu")
            tensor = group.zeros(numel, torch.float32, cpu) if kind == "shared" else torch.zeros(numel)
            tensor += rank.rank + 1
            dist.all_reduce(tensor, group=group) if kind == "blocking" else group.all_reduce(tensor).wait()
            assert bool((tensor == sum(range(1, rank.world + 1))).all())
    except CommError as error:
        return f"{victim}: {error}"
    return "no error"


def survive(seeds: range) -> None:
    for seed in seeds:
        world = 2 + seed % 3
        victim = random.Random(seed).randrange(world)
        for rank, text in enumerate(run_ranks(world, random_death, seed, may_die=(victim,), patience_s=0)):
            if rank != victim:
                assert f"rank {victim} died" in text, (seed, text)


def test_random_deaths() -> None:
    survive(range(25))


@pytest.mark.slow
def test_a_thousand_random_deaths() -> None:
    survive(range(25, 1025))
