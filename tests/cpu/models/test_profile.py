"""Profiles against formulas, against what autograd really keeps, and on modules that nobody prepared for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import JobError
from shardwise.models import losses, resnet
from shardwise.models.blocks import find_blocks
from shardwise.models.encoder import Encoder
from shardwise.models.gpt import GPT
from shardwise.models.inputs import call
from shardwise.models.profile import FAKE_SAMPLES, profile
from shardwise.spec.profile import ModelProfile

BATCH, LENGTH, WIDTH, VOCAB = 3, 32, 64, 100
TOKENS = {
    "tokens": torch.randint(VOCAB, (BATCH, LENGTH)),
    "targets": torch.randint(VOCAB, (BATCH, LENGTH)),
}


def gpt(**changes: Any) -> GPT:
    return GPT(**(dict(layers=3, width=WIDTH, heads=4, vocab=VOCAB, context=LENGTH) | changes))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_size_of_the_example_batch_does_not_matter(samples: int) -> None:
    # Two is also the first dimension of the table of rotations, which must not be taken for a part of the batch.
    batch = {name: tensor[:samples] for name, tensor in TOKENS.items()}
    assert profile(gpt, batch) == profile(gpt, TOKENS)


def shape_of(found: ModelProfile) -> list[str]:
    return [block.name for block in found.blocks]


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def really_kept(module: nn.Module, batch: Any, loss: Callable[..., Any] | None = None) -> int:
    """Bytes of the distinct memory regions that autograd holds after a real forward pass, without the module's own."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    regions: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        regions[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(module.train(), batch)
        if loss is not None:
            output = loss(output, batch)
    return sum(size for place, size in regions.items() if place not in own)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "tied": False}, {"norm": "layer", "activation": "gelu"}])
def test_gpt_flops_follow_the_formula(changes: dict[str, Any]) -> None:
    found = profile(lambda: gpt(**changes), TOKENS)
    model = gpt(**changes)
    attention = 2 * 2 * LENGTH * LENGTH * WIDTH
    for block, module in zip(found.blocks[1:-1], model.blocks, strict=True):
        weights = sum(inner.weight.numel() for inner in module.modules() if isinstance(inner, nn.Linear))
        assert block.forward_flops == 2 * weights * LENGTH + attention
        assert block.parameters == num_parameters(module)
        assert block.boundary_bytes == LENGTH * WIDTH * 4
        assert [linear.name.split(".", 2)[2] for linear in block.linears] == [
            "attention.qkv",
            "attention.out",
            "mlp.up",
            "mlp.down",
        ]
    assert shape_of(found) == ["before", "blocks.0", "blocks.1", "blocks.2", "after"]
    assert found.blocks[-1].forward_flops == 2 * WIDTH * VOCAB * LENGTH
    assert found.blocks[0].boundary_bytes == LENGTH * WIDTH * 4
    assert found.blocks[-1].boundary_bytes == LENGTH * VOCAB * 4
    assert found.parameters == num_parameters(model)
    assert found.tied == ((("embed.weight", "head.weight"),) if changes.get("tied", True) else ())
    assert found.sample == f"tokens int64[{LENGTH}], targets int64[{LENGTH}]"


@pytest.mark.parametrize("loss", [None, losses.next_token_loss])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"norm": "layer", "activation": "gelu"}, {"dropout": 0.1}])
def test_activation_bytes_are_what_autograd_keeps(changes: dict[str, Any], loss: Any) -> None:
    found = profile(lambda: gpt(**changes), TOKENS, loss=loss)
    # Each block's share is rounded to whole bytes of one sample. Torch's loss keeps the targets too; ours does not.
    slack = 20 + (TOKENS["targets"].nbytes if loss else 0)
    assert found.activation_bytes * BATCH == pytest.approx(really_kept(gpt(**changes), TOKENS, loss), abs=slack)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_activation_bytes_of_the_classifiers(pool: Any) -> None:
    batch = {"tokens": torch.randint(50, (4, 12)), "mask": torch.ones(4, 12, dtype=torch.bool)}

    def encoder() -> Encoder:
        return Encoder(layers=2, width=32, heads=4, vocab=50, context=12, classes=3, pool=pool, dropout=0.0)

    found = profile(encoder, batch)
    assert found.activation_bytes * 4 == pytest.approx(really_kept(encoder(), batch), abs=20)
    images = torch.randn(FAKE_SAMPLES, 3, 16, 16)  # the channels' means are kept once a batch, so its size matters
    found = profile(resnet.small, images)
    assert found.activation_bytes * FAKE_SAMPLES == pytest.approx(really_kept(resnet.small(), images), abs=20)


def test_convolutions_count_two_flops_for_each_product() -> None:
    found = profile(lambda: resnet.small(channels=1), (torch.randn(2, 1, 28, 28), None))
    assert shape_of(found) == ["before", "blocks.0", "blocks.1", "blocks.2", "after"]
    assert found.blocks[0].forward_flops == 2 * 16 * 9 * 28 * 28
    assert found.blocks[1].forward_flops == 2 * 2 * 16 * 16 * 9 * 28 * 28
    assert found.blocks[2].forward_flops == 2 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 14 * 14
    assert [block.boundary_bytes for block in found.blocks[1:4]] == [16 * 28 * 28 * 4, 32 * 14 * 14 * 4, 64 * 7 * 7 * 4]


def test_a_sequential_module_is_its_children() -> None:
    found = profile(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))
    facts = [(b.name, b.parameters, b.forward_flops, b.activation_bytes, b.boundary_bytes) for b in found.blocks]
    assert facts == [("0", 16, 24, 12, 16), ("1", 0, 0, 16, 16), ("2", 10, 16, 0, 8)]


def test_encoder_and_decoder_make_one_chain() -> None:
    batch = {"src": torch.randn(2, 8, 32), "tgt": torch.randn(2, 6, 32)}
    module = nn.Transformer(32, 2, 2, 2, 64, batch_first=True)
    found = profile(module, batch)
    assert shape_of(found) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1", "after"]
    assert found.parameters == num_parameters(module)
    assert found.blocks[0].forward_flops == 2 * 8 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 8 * 8 * 32
    assert found.blocks[2].forward_flops == (
        2 * 6 * (4 * 32 * 32 + 2 * 32 * 32 + 2 * 32 * 64) + 2 * 8 * 2 * 32 * 32 + 4 * 6 * 6 * 32 + 4 * 6 * 8 * 32
    )


def test_a_module_without_repetition_is_one_block() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)

    (block,) = profile(Sum, torch.randn(3, 4)).blocks
    assert (block.name, block.parameters, block.forward_flops, block.boundary_bytes) == ("model", 20, 32, 8)
    assert [linear.name for linear in block.linears] == ["left", "right"]


def test_recurrent_layers_are_counted() -> None:
    (block,) = profile(lambda: nn.LSTM(6, 5, num_layers=2, batch_first=True), torch.randn(3, 7, 6)).blocks
    assert block.forward_flops == 2 * 7 * (4 * 5 * (6 + 5) + 4 * 5 * (5 + 5))


def test_details_that_repeat_do_not_hide_the_chain() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"words": nn.Embedding(50, 8), "places": nn.Embedding(9, 8)})
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(4))
            self.head = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))

    assert list(find_blocks(Model())) == [f"layers.{index}" for index in range(4)]


def test_a_block_that_runs_several_times_is_one_block() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.layers[1], self.layers[0], self.layers[1]):
                x = layer(x)
            return x @ x.new_ones(4, 4)

    found = profile(Loop, torch.randn(2, 4))
    assert [(b.name, b.parameters, b.forward_flops) for b in found.blocks] == [
        ("layers.1", 16, 64),
        ("layers.0", 16, 32),
        ("layers.2", 16, 0),
        ("after", 0, 32),
    ]


def test_a_model_larger_than_memory_is_profiled() -> None:
    batch = {"tokens": torch.zeros(1, 2048, dtype=torch.int64)}
    found = profile(lambda: gpt(layers=4, width=32768, heads=256, vocab=100_000, context=2048), batch)
    assert found.parameters == pytest.approx(55e9, rel=0.1)


def test_batch_normalisation_of_single_values_does_not_refuse_one_sample() -> None:
    found = profile(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(1, 4))
    assert found.parameters == 15 + 6 + 8


class LooksAtNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum().item() > 0 else self.linear(self.linear(x))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_module_that_looks_at_numbers_is_run_for_real(sign: float) -> None:
    (block,) = profile(LooksAtNumbers, torch.full((40, 4), sign)).blocks
    assert block.forward_flops == (32 if sign > 0 else 64)
    assert block.boundary_bytes == 16


def test_a_given_module_and_the_random_state_stay_as_they_are() -> None:
    module = resnet.small(channels=1).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = list(module.parameters())
    state = torch.get_rng_state()
    found = profile(module, torch.randn(2, 1, 8, 8).clone())
    torch.set_rng_state(state)
    assert found == profile(lambda: resnet.small(channels=1), torch.randn(2, 1, 8, 8))
    assert not module.training
    assert all(ours is theirs for ours, theirs in zip(parameters, module.parameters(), strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not module._forward_hooks


def test_a_model_that_is_a_copy_is_profiled_without_a_word() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    batch, before = {"input": torch.randn(2, 4)}, torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = profile(lambda: copy.deepcopy(build()), batch)
    finally:
        torch.set_warn_always(before)
    assert found == profile(build, batch)
    assert not said


def test_the_jobs_forward_gets_the_batch_in_its_own_form() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor

    batch = Pair(torch.randn(2, 4), torch.randn(2, 4))
    (block,) = profile(lambda: nn.Linear(4, 3), batch, forward=lambda model, pair: model(pair.left + pair.right)).blocks
    assert block.forward_flops == 24


def test_errors_of_the_model_are_told_in_one_paragraph() -> None:
    with pytest.raises(JobError, match=r"cannot be profiled: RuntimeError: .*batch of x float32\[5\]") as caught:
        profile(lambda: nn.Linear(4, 2), {"x": torch.randn(3, 5)})
    assert "\n" not in str(caught.value)
    with pytest.raises(JobError, match="context=32 but was given 40"):
        profile(gpt, {"tokens": torch.zeros(2, 40, dtype=torch.int64)})
    with pytest.raises(JobError, match="returned int"):
        profile(lambda: 3, torch.randn(2, 2))
    with pytest.raises(JobError, match="no tensor with at least one sample"):
        profile(gpt, {"tokens": "text"})


def hugging_face(name: str) -> tuple[Callable[[], nn.Module], dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e .[hf]")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    ends = dict(bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(50, (2, 7))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=16, **ends)
        return lambda: transformers.GPT2LMHeadModel(config), batch
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, **ends)
        return lambda: transformers.LlamaForCausalLM(config), batch
    config = transformers.BertConfig(**sizes)
    return lambda: transformers.BertForSequenceClassification(config), batch


@pytest.mark.parametrize(
    ("name", "first_block"),
    [("gpt2", "transformer.h.0"), ("llama", "model.layers.0"), ("bert", "bert.encoder.layer.0")],
)
def test_transformers_models_are_profiled_as_they_come(name: str, first_block: str) -> None:
    build, batch = hugging_face(name)
    found = profile(build, batch)
    assert found.parameters == num_parameters(build())
    assert shape_of(found)[:2] == ["before", first_block]
    assert len(found.blocks) == 4
    per_layer = 2 * 7 * (4 * 16 * 16 + (3 if name == "llama" else 2) * 16 * (64 if name == "gpt2" else 32))
    assert found.blocks[1].forward_flops == per_layer + 4 * 7 * 7 * 16
    assert len(found.blocks[1].linears) == {"gpt2": 4, "llama": 7, "bert": 6}[name]
