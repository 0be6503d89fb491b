"""`verify` finds nothing where a plan computes the same, and the first parameter that differs where it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.main import run
from shardwise.errors import SpecError
from shardwise.train import api

Train = Callable[..., Any]


@pytest.mark.parametrize(
    "plan",
    [
        "data=2",
        "data=2,exact=true",
        "pipeline=2",
        "data=8,pipeline=2",
        "pipeline=2,virtual=2,schedule=zbv",
        "shard=2,zero=1",
        "shard=2,zero=2,microbatches=2",
        "data=2,shard=64,zero=3",
    ],
)
def test_a_plan_computes_the_same(plan: str, trained: Train, tmp_path: Path) -> None:
    report = api.verify(tmp_path / "small.py", plan=plan, dropout=0.3)
    assert report.same, report.text()
    assert report.steps == 3
    assert report.ranks <= 4
    errors = [report.outputs.error, report.gradients.error, report.parameters.error, report.loss.error]
    assert all(error is not None and error < 1e-9 for error in errors)
    assert report.losses == pytest.approx(report.expected, rel=1e-9)
    assert report.losses[0] != report.losses[1]
    assert report.gradients.where
    assert report.outputs.where.startswith("place 0 microbatch 0")


SECRET = """
class Net(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), Layer(16), Layer(16), torch.nn.Linear(16, 3))

    def forward(self, inputs):
        return self.layers(inputs)


class Layer(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)

    def forward(self, x):
        out = super().forward(x)
        FAULT
        return out
"""
FAULTS = {  # what rank 1 does that one process does not
    "out = out * (1 + 0.1 * int(os.environ['RANK']))": "the output of place 0 microbatch 0 leaf 0 differs already",
    "out.requires_grad and out.register_hook(lambda g: g * (1 + int(os.environ['RANK'])))": "times what it should be",
}


DETACHED = """
class Net(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in ((6, 16), (16, 16), (16, 16), (16, 3)))

    def forward(self, inputs):
        x = self.layers[1](self.layers[0](inputs)).detach()
        return self.layers[3](self.layers[2](x))
"""


def test_a_gradient_that_one_device_does_not_have_is_named(trained: Train, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    text = file.read_text()
    file.write_text(text[: text.index("class Net")] + DETACHED + "\n\n" + text[text.index("def kill_once") :])
    report = api.verify(file, plan="pipeline=2")
    assert report.gradients.error is None
    assert "'layers.0.bias' has a gradient, where one device leaves it without one" in report.text()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_named(fault: str, trained: Train, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    text = file.read_text()
    start, end = text.index("class Net"), text.index("def kill_once")
    file.write_text(text[:start] + SECRET.replace("FAULT", fault) + "\n\n" + text[end:])
    report = api.verify(file, plan="pipeline=2")
    assert not report.same
    assert FAULTS[fault] in report.text()


def test_the_command_says_so_and_what_changes_the_numbers_is_refused(
    trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(tmp_path / "small.py"), "--plan", "pipeline=2"]) == 0
    assert "computes the same" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "small.py"), "--steps", "0"]) == 2
    assert api.verify(tmp_path / "small.py").ranks == 2, "what train would take"
    assert "pipeline=4" in api.verify(tmp_path / "small.py", plan="pipeline=64").text()
    with pytest.raises(SpecError, match="changes the numbers by its nature"):
        api.verify(tmp_path / "small.py", plan="data=2,sync=local,sync.every=2")


DEEP = """
class Net(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.first = torch.nn.Linear(6, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(12))
        self.last = torch.nn.Linear(16, 3)

    def forward(self, inputs):
        x = self.first(inputs)
        for layer in ORDER:
            x = layer(x).tanh()
        return self.last(x)
"""


@pytest.mark.parametrize(("order", "blocks"), [("self.layers", 4), ("(self.layers[i] for i in range(12))", 12)])
def test_a_deep_model_is_verified_with_fewer_blocks(order: str, blocks: int, trained: Train, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    text = file.read_text()
    deep = DEEP.replace("ORDER", order)
    file.write_text(text[: text.index("class Net")] + deep + "\n\n" + text[text.index("def kill_once") :])
    report = api.verify(file, plan="pipeline=2")
    assert report.same, report.text()
    assert report.blocks == blocks
    assert f"a model of {blocks} blocks" in report.text()


MIXTURE = """
import torch, transformers
import shardwise as sw

X = torch.randint(64, (8, 8), generator=torch.Generator().manual_seed(1))


def model():
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_hidden_layers=2)
    sizes = dict(hidden_size=32, intermediate_size=64, vocab_size=64)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**heads, **sizes))


def job() -> sw.TrainJob:
    return sw.TrainJob(
        model=model, loss=sw.next_token_loss, data=sw.arrays({"input_ids": X, "targets": X}),
        forward=lambda model, batch: model(input_ids=batch["input_ids"]).logits,
        optimizer=sw.sgd(lr=0.1), global_batch=4, steps=2,
    )
"""


@pytest.mark.parametrize(
    "plan",
    [
        "tensor=2",
        *(
            pytest.param(plan, marks=pytest.mark.slow)
            for plan in ("tensor=2,sequence=true", "pipeline=2", "tensor=2,recompute=full", "pipeline=2,tensor=2")
        ),
    ],
)
def test_a_mixture_that_computes_grouped_products_is_verified_in_float64(
    plan: str, trained: Train, tmp_path: Path
) -> None:
    file = tmp_path / "mixture.py"
    file.write_text(MIXTURE)
    report = api.verify(file, plan=plan)
    assert report.same, report.text()
    assert report.gradients.error is not None
    assert report.gradients.error < 1e-9
