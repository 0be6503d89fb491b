"""FSDP2 with compressed gradients: what is summed, how training goes, and what is kept over a resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.comm.group import Group
from shardwise.comm.kernel import library
from shardwise.comm.methods import make_codec
from shardwise.errors import JobError
from shardwise.models.gpt import GPT
from shardwise.parallel.fsdp_compression import Sharded, compress_gradients
from tests.ranks import Rank, run_ranks

WINDOW, VOCAB = 16, 40


@pytest.fixture(params=["gloo", "shm"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks inherit it."""
    if request.param == "shm" and library() is None:
        pytest.skip("built without a C compiler")
    monkeypatch.setenv("SHARDWISE_TRANSPORT", request.param)


def build() -> nn.Module:
    torch.manual_seed(0)
    return GPT(layers=2, width=32, heads=2, vocab=VOCAB, context=WINDOW)


def shard(rank: Rank, net: nn.Module, **policy: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        rank.mesh()
    devices = dist.device_mesh.init_device_mesh("cpu", (rank.world,))
    policy = {"mp_policy": MixedPrecisionPolicy(**policy)} if policy else {}
    for block in net.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=devices, **policy)
    fully_shard(net, mesh=devices, **policy)


def tokens(step: int, rank: int) -> Tensor:
    """A language that a small model learns in a hundred steps: the next token is a function of the last two."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    rows = torch.randint(0, VOCAB, (8, WINDOW + 1), generator=g)
    for i in range(2, WINDOW + 1):
        rows[:, i] = (3 * rows[:, i - 1] + rows[:, i - 2] + 7) % VOCAB
    return rows


def loss_of(net: nn.Module, step: int, rank: int) -> Tensor:
    rows = tokens(step, rank)
    output = net(rows[:, :-1])
    return nn.functional.cross_entropy(output.reshape(-1, VOCAB), rows[:, 1:].reshape(-1))


def train(rank: Rank, methods: Sequence[str], steps: int) -> dict[str, tuple[list[float], dict[str, int]]]:
    """For each method ("": plain FSDP2) the mean losses of all steps, and the bytes by operation."""
    found = {}
    for method in methods:
        net = build()
        shard(rank, net)
        if method:
            compress_gradients(net, make_codec(method, density=0.05))
        world = dist.group.WORLD
        assert isinstance(world, Group)
        before = dict(world.wire)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        losses = []
        for step in range(steps):
            loss = loss_of(net, step, rank.rank)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            whole = loss.detach().clone()
            dist.all_reduce(whole)
            losses.append(float(whole) / rank.world)
        moved = {op: total - before.get(op, (0, 0))[1] for op, (_, total) in world.wire.items()}
        found[method] = losses, moved
    return found


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_backward_sums_what_plain_fsdp_sums(ranks: int) -> None:
    """3 ranks do not divide the parameters: their parts are padded."""
    for plain, bf16, exact in run_ranks(ranks, one_backward):
        for name, true in plain.items():
            scale = float(true.abs().max())
            torch.testing.assert_close(bf16[name], true, rtol=0, atol=6e-3 * scale)
            torch.testing.assert_close(exact[name], true, rtol=0, atol=1e-6 * scale)


def one_backward(rank: Rank) -> list[dict[str, Tensor]]:
    net = build()
    shard(rank, net)
    found = []
    for method in ("", "bf16", "none"):
        if method:
            compress_gradients(net, make_codec(method))
        loss_of(net, 0, rank.rank).backward()
        found.append({name: p.grad.full_tensor() for name, p in net.named_parameters()})  # type: ignore[union-attr]
        net.zero_grad()
    return found


@pytest.mark.usefixtures("transport")
def test_training_follows_plain_fsdp() -> None:
    found = run_ranks(2, train, ["", "bf16", "int8", "topk"], 60)[0]
    plain, wire = found.pop("")
    assert plain[-1] < 0.85 * plain[0]
    for method, near, share in (("bf16", 0.01, 0.51), ("int8", 0.02, 0.28), ("topk", 0.05, 0.07)):
        losses, moved = found[method]
        assert losses[0] == plain[0]
        end, other = sum(plain[-5:]) / 5, sum(losses[-5:]) / 5
        assert abs(other - end) <= near * end, (method, end, other)
        assert not moved["reduce_scatter"]
        # Of what a reduce-scatter of two ranks is given half crosses, of what all_to_all is given everything.
        assert moved["all_to_all"] <= share * wire["reduce_scatter"] / 2


def conserved(rank: Rank, method: str) -> Any:
    """The same weights all the time: sums of gradients with and without compression."""
    net = build()
    shard(rank, net)
    true: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for step in range(4):
        loss_of(net, step, rank.rank).backward()
        add(true, net)
    compression = compress_gradients(net, make_codec(method, density=0.05))
    for step in range(4):
        loss_of(net, step, rank.rank).backward()
        add(given, net)
    return true, given, compression.state()


def add(sums: dict[str, Tensor], net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        grad = parameter.grad.full_tensor().double()  # type: ignore[union-attr]
        sums[name] = sums[name] + grad if name in sums else grad
    net.zero_grad()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("method", ["bf16", "int8", "topk"])
def test_what_was_applied_and_what_is_left_are_the_gradients(method: str, ranks: int) -> None:
    found = run_ranks(ranks, conserved, method)
    true, given, _ = found[0]
    for name in true:
        left = sum(state["residual." + name].double() for _, _, state in found) / ranks
        assert left.shape == true[name].shape
        torch.testing.assert_close(given[name] + left, true[name], rtol=0, atol=1e-5 * float(true[name].abs().max()))
    assert all(any(kept.any() for kept in state.values() if kept.dim() == 2) for _, _, state in found)


def on_from(rank: Rank, states: list[dict[str, Tensor]] | None) -> Any:
    """Two backwards, or the second of them from the state after the first."""
    net = build()
    shard(rank, net)
    compression = compress_gradients(net, make_codec("int8"), start=0)
    if states is None:
        loss_of(net, 0, rank.rank).backward()
        net.zero_grad()
    else:
        compression.load_state(states, rank.rank)
    state = {k: v.clone() for k, v in compression.state().items()}
    loss_of(net, 1, rank.rank).backward()
    grads = {name: p.grad.full_tensor() for name, p in net.named_parameters()}  # type: ignore[union-attr]
    return state, grads


def test_the_state_goes_on_bit_for_bit_and_is_shared_by_other_numbers_of_ranks() -> None:
    found = run_ranks(2, on_from, None)
    states = [state for state, _ in found]
    for me, (state, grads) in enumerate(run_ranks(2, on_from, states)):
        assert state.keys() == states[me].keys()
        assert all(torch.equal(state[key], states[me][key]) for key in state)
        assert all(torch.equal(grads[name], found[me][1][name]) for name in grads)
    for state, _ in (fewer := run_ranks(3, on_from, states)):
        assert state.keys() == states[0].keys()
    for key in states[0]:
        if key != "steps":
            torch.testing.assert_close(sum(s[key] for s, _ in fewer), sum(s[key] for s in states))


def frozen_for_a_while(rank: Rank) -> Any:
    """A block is frozen, then trained again; exact steps empty what was left out."""
    net = build()
    shard(rank, net)
    compression = compress_gradients(net, make_codec("topk", density=0.02))
    for step in range(2):
        loss_of(net, step, rank.rank).backward()
        net.zero_grad()
    before = {k: v.clone() for k, v in compression.state().items()}
    some = [p for name, p in net.named_parameters() if "bias" in name or "norm" in name]
    for parameter in some:
        parameter.requires_grad_(False)
    loss_of(net, 2, rank.rank).backward()
    net.zero_grad()
    between = {k: v.clone() for k, v in compression.state().items()}
    for parameter in some:
        parameter.requires_grad_(True)
    loss_of(net, 3, rank.rank).backward()
    net.zero_grad()
    compression.set_exact(exact=True)
    loss_of(net, 4, rank.rank).backward()
    return before, between, compression.state(), len(some)


def test_residuals_are_kept_while_parameters_are_frozen() -> None:
    for before, between, after, frozen in run_ranks(2, frozen_for_a_while):
        assert frozen
        assert before.keys() == between.keys() == after.keys()
        changed = {k for k in before if not torch.equal(before[k], between[k])}
        assert changed
        assert not any("norm" in k or "bias" in k for k in changed)
        assert not any(v.any() for k, v in after.items() if k != "steps")


def mixed(rank: Rank) -> Any:
    net = build()
    shard(rank, net, param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    losses = []
    for method in ("", "int8"):
        if method:
            compress_gradients(net, make_codec(method))
        loss_of(net, 0, rank.rank).backward()
        losses.append({name: p.grad.full_tensor().float() for name, p in net.named_parameters()})  # type: ignore[union-attr]
        net.zero_grad()
    return losses


def test_gradients_that_are_reduced_in_bfloat16() -> None:
    for plain, int8 in run_ranks(2, mixed):
        for name, true in plain.items():
            assert float((int8[name] - true).norm()) <= 0.02 * float(true.norm()), name


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_join_to_the_whole(ranks: int, dim: int) -> None:
    shape = (5, 3) if dim == 0 else (5, 12, 2)
    each = Sharded("w", shape, dim)
    whole = torch.randn(shape)
    parts = each.cut(whole, ranks)
    assert parts.shape == (ranks, each.chunk(ranks))
    assert torch.equal(each.join(parts), whole)


def test_a_module_that_is_not_sharded_is_refused() -> None:
    with pytest.raises(JobError, match="fully_shard"):
        compress_gradients(build(), make_codec("int8"))
