"""A module in stages computes what it computes in one piece: the same loss and the same gradients, in float64."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from architectures import NAMES, Tied, batch, build, loss
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.models.cuts import held, parts
from shardwise.models.dataflow import Dataflow, Made, dataflow
from shardwise.parallel.flows import Flows
from shardwise.parallel.stage import Stage
from shardwise.spec.plan import Plan
from shardwise.spec.plan import Stage as Stages

CLOSE = 1e-9  # relative
QUICK = ("gpt2", "albert", "t5", "unet", "mixer", "tied", "frozen", "halves", "spellings", "inplace", "inplace_frozen")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]


def even(calls: int, stages: int) -> list[int]:
    return [calls * number // stages for number in range(stages)]


class Cut(NamedTuple):
    """Stages in one process, and where each begins."""

    stages: list[Stage]
    firsts: list[int]
    flow: Dataflow


def cut(module: nn.Module, one: Any, stages: int) -> Cut:
    """What a stage does not hold is NaN, so that nothing can read it unseen."""
    flow = dataflow(copy.deepcopy(module), one, loss=loss)
    found = []
    firsts = even(len(flow.calls), min(stages, len(flow.calls)))
    for part in parts(flow, firsts):
        piece = copy.deepcopy(module)
        mine = held(piece, flow, part)
        stage = Stage(piece, [one.name for one in flow.calls], mine)
        stage.open()
        for name, parameter in stage.module.named_parameters():
            if name not in mine:
                assert parameter.untyped_storage().nbytes() == parameter.element_size()
                parameter.data = parameter.new_full((), torch.nan).expand(parameter.shape)
        found.append(stage)
    return Cut(found, firsts, flow)


def forward_and_backward(pieces: Cut, one: Any, flow: Dataflow | None = None) -> Tensor:
    """The loss; gradients go back through what was handed on."""
    flow = flow or pieces.flow
    received: tuple[Tensor, ...] = ()
    came: list[tuple[Tensor, ...]] = []
    left: list[Any] = []
    for stage, part in zip(pieces.stages, parts(flow, pieces.firsts), strict=True):
        received = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in received)
        came.append(received)
        received = stage.run(flow, part, one, received)
        left.append(received)
    total, _ = loss(received, one)
    total.backward()
    for output, following in reversed(list(zip(left[:-1], came[1:], strict=True))):
        both = [(a, b.grad) for a, b in zip(output, following, strict=True) if b.grad is not None and a.requires_grad]
        torch.autograd.backward([a for a, _ in both], [b for _, b in both])
    return total.detach()


def everything(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


@torch.no_grad()
def whole(module: nn.Module, one: Any) -> float:
    return float(loss(module(**one), one)[0])


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", ALL)
def test_stages_compute_what_the_whole_module_computes(name: str, stages: int) -> None:
    module, one = build(name), batch(name)
    several = cut(module, one, stages)
    expected, _ = loss(module(**one), one)
    expected.backward()
    found = forward_and_backward(several, one)
    assert float(found) == pytest.approx(float(expected.detach()), rel=CLOSE)
    pieces = [dict(stage.module.named_parameters()) for stage in several.stages]
    for parameter_name, parameter in module.named_parameters():
        there = [p.grad for p in (each[parameter_name] for each in pieces) if p.grad is not None]
        if parameter.grad is None:
            assert not any(float(grad.abs().max()) for grad in there), parameter_name
            continue
        assert there, parameter_name
        error = (sum(there) - parameter.grad).norm() / (parameter.grad.norm() + 1e-12)  # type: ignore[union-attr]
        assert error < CLOSE, parameter_name


def test_what_crosses_is_what_later_stages_need_and_no_more() -> None:
    flow = dataflow(build("unet"), batch("unet"), loss=loss)
    assert [one.name for one in flow.calls] == ["down", "deeper", "middle.0", "middle.1", "up.0", "up.1", "top", "out"]
    first, second, third = parts(flow, [0, 3, 6])
    assert first.sends == second.receives == ((0, 0), (1, 0), (2, 0))
    assert second.sends == third.receives == ((0, 0), (5, 0))
    assert third.sends == ()


def test_a_tied_parameter_and_those_of_the_model_itself_are_held_where_they_are_used() -> None:
    module = build("tied")
    flow = dataflow(module, batch("tied"), loss=loss)
    first, second, third = parts(flow, [0, 1, 5])
    assert held(module, flow, first) == ["words.weight"]
    assert held(module, flow, second) == ["weights", *(f"blocks.{n}.{p}" for n in range(4) for p in ("weight", "bias"))]
    assert held(module, flow, third) == ["weights", "words.weight"]  # the last block's output is weighed after it


@pytest.mark.parametrize("name", ALL)
def test_a_stage_sees_the_flow_of_the_whole_module(name: str) -> None:
    """Without the numbers of what it does not hold, and without a change to anything that it does."""
    module, one = build(name), batch(name)
    known = dataflow(copy.deepcopy(module), one, loss=loss)
    middle = len(known.calls) // 2
    blocks = tuple(call.name for call in known.calls)
    ends = Stages(first=0, last=middle - 1), Stages(first=middle, last=len(blocks) - 1)
    mine = held(module, known, parts(known, [0, middle])[1])
    stage = Stage(module, blocks, mine)
    stage.open()
    before = {n: t.clone() for n, t in (*module.named_parameters(), *module.named_buffers())}
    plan = Plan(pipeline=2, blocks=blocks, stages=ends)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    flows = Flows(module, plan, stage.closed, numbers=[1], kept=mine, shapes=shapes)
    state = torch.get_rng_state()
    seen = flows.route(one, None, loss=loss).flow
    assert torch.equal(torch.get_rng_state(), state)
    assert flows.route(one, None, loss=loss).flow is seen
    assert [call.needs for call in seen.calls] == [call.needs for call in known.calls]
    for a, b in zip(seen.calls, known.calls, strict=True):
        assert [leaf for leaf in a.leaves if isinstance(leaf, Made)] == [x for x in b.leaves if isinstance(x, Made)]
    assert seen.loss == known.loss
    after = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(torch.equal(after[n].detach(), t) for n, t in before.items())


def test_dropout_is_seen_to_draw_numbers() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4))
    assert dataflow(module, torch.ones(2, 4)).random
    assert not dataflow(module.eval(), torch.ones(2, 4)).random


def test_a_batch_of_another_shape_is_followed() -> None:
    module = build("tied")
    stages = cut(module, batch("tied"), 3)
    longer = {"input_ids": torch.arange(40).view(2, 20)}
    flow = dataflow(copy.deepcopy(module), longer, loss=loss)
    assert float(forward_and_backward(stages, longer, flow)) == pytest.approx(whole(module, longer), rel=CLOSE)
    one = batch("tied")
    assert float(forward_and_backward(stages, one)) == pytest.approx(whole(module, one), rel=CLOSE)


def test_after_close_the_module_runs_as_it_did() -> None:
    module, one = build("tied"), batch("tied")
    before = module(**one)["logits"]
    flow = dataflow(copy.deepcopy(module), one, loss=loss)
    stage = Stage(module, [one.name for one in flow.calls], everything(module))
    stage.open()
    stage.close()
    assert torch.equal(module(**one)["logits"], before)
    assert not any("forward" in vars(inner) for inner in module.modules())


def test_a_forward_of_an_object_s_own_is_there_again_after_close() -> None:
    module, one = build("tied"), batch("tied")
    own = module.head.forward = lambda x: x.sum(-1, keepdim=True)
    flow = dataflow(copy.deepcopy(module), one, loss=loss)
    stage = Stage(module, [one.name for one in flow.calls], everything(module))
    stage.open()
    assert module.head.forward is not own
    stage.close()
    assert module.head.forward is own


class Looks(Tied):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
            if x.mean() > 0:
                x = -x
        return {"logits": self.head(x)}


class Keeping(nn.Linear):
    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * 2
        return super().forward(self.kept)


class Leaks(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Keeping(16, 16) for _ in range(4))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.blocks[0](self.words(input_ids))
        return {"logits": self.head(self.blocks[1](x) * self.blocks[0].kept)}


class Adding(nn.Linear):
    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return super().forward(x) * count.clone()


class Counts(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding(16, 16) for _ in range(4))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x, count = self.words(input_ids), torch.ones(())
        for block in self.blocks:
            x = block(x, count)
        return {"logits": self.head(x)}


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Counts, "'blocks.0' writes into a tensor"), (Looks, "looks at numbers"), (Leaks, "'blocks.0' leaves a tensor")],
)
def test_what_cannot_be_cut_is_refused(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(JobError, match=said):
        dataflow(kind(), {"input_ids": torch.arange(8).view(2, 4)}, loss=loss)


class Shuffled(Tied):
    turn = 0

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.words(input_ids)
        for index in range(4):
            x = self.blocks[(index + self.turn) % 4](x)
        return {"logits": self.head(x)}


def test_another_order_of_blocks_is_an_error() -> None:
    module, one = Shuffled(), {"input_ids": torch.arange(8).view(2, 4)}
    flow = dataflow(module, one, loss=loss)
    stage = Stage(module, [each.name for each in flow.calls], everything(module))
    stage.open()
    module.turn = 1
    with pytest.raises(JobError, match="'blocks.1' is call 1 of this batch"):
        stage.run(flow, parts(flow, [0])[0], one, ())


@pytest.mark.parametrize("firsts", [[], [1, 2], [0, 2, 2], [0, 3, 2], [0, 6]])
def test_more_stages_than_calls_and_other_nonsense_are_refused(firsts: list[int]) -> None:
    flow = dataflow(build("tied"), batch("tied"), loss=loss)
    with pytest.raises(JobError, match="it has 6"):
        parts(flow, firsts)


class Between(Tied):
    """Dropout between its parts, whose result one or all of the blocks take."""

    def __init__(self, *, all_blocks: bool) -> None:
        super().__init__()
        self.all_blocks = all_blocks

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = first = nn.functional.dropout(self.words(input_ids), 0.5)
        for block in self.blocks:
            x = block(x + first if self.all_blocks else x)
        return {"logits": self.head(x)}


def test_what_was_drawn_before_a_cut_is_not_drawn_again_after_it() -> None:
    one = {"input_ids": torch.arange(8).view(2, 4)}
    flow = dataflow(Between(all_blocks=False), one, loss=loss)
    assert parts(flow, [0, 1, 3])
    flow = dataflow(Between(all_blocks=True), one, loss=loss)
    assert parts(flow, [0, 1])
    with pytest.raises(JobError, match=r"cut before 'blocks.2': .*test_stage.py, line \d+"):
        parts(flow, [0, 3])
