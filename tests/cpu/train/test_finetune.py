"""Fine-tuning recipes on tiny weights: what is learned in stages, and what other programs read of it afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from shardwise.checkpoint.load import newest_whole, read_tensors
from shardwise.checkpoint.store import LocalStore
from shardwise.data.fetch import PACKAGES
from shardwise.errors import DataError
from shardwise.train import api
from tests.cpu.train.test_train import losses

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers
RECIPES = Path(__file__).resolve().parents[3] / "recipes"
TOKENS = torch.arange(24).view(2, 12) % 300

JOB = """
import sys
sys.path.insert(0, {recipes!r})
import torch
import finetune_{recipe} as recipe
import shardwise as sw

sw.{recipe} = lambda: {folder!r}
TOKENS = torch.randint(300, (32, 12), generator=torch.Generator().manual_seed(1))
BATCH = {{"tokens": TOKENS, "mask": torch.ones_like(TOKENS, dtype=torch.bool), "targets": {targets}}}


def job(lora: bool = False, layers: int = 3, steps: int = 6) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: recipe.build(layers, lora),
        loss={loss},
        forward=lambda model, batch: {forward},
        data=sw.arrays(BATCH, eval=BATCH),
        optimizer=sw.adamw(lr=0.003, weight_decay=0.0),
        global_batch=8,
        steps=steps,
        eval_every=steps,
        clip_norm=1.0,
    )
"""
PARTS = {
    "smollm2": ("TOKENS", "sw.next_token_loss", 'model(input_ids=batch["tokens"]).logits'),
    "minilm": ("(TOKENS[:, 0] > 150).long()", "sw.cross_entropy", 'model(batch["tokens"], batch["mask"])'),
}


def tiny(recipe: str, folder: Path) -> Path:
    """Weights of another program's, as it writes them."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 300}
    if recipe == "smollm2":
        config = tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        tf.LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config = tf.BertConfig(**sizes, num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0)
        tf.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(recipe: str) -> Path:
        targets, loss, forward = PARTS[recipe]
        folder = str(tiny(recipe, tmp_path / "weights"))
        text = JOB.format(
            recipes=str(RECIPES), recipe=recipe, folder=folder, targets=targets, loss=loss, forward=forward
        )
        file = tmp_path / f"tiny_{recipe}.py"
        file.write_text(text)
        return file

    return write


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("recipe", "lora", "plan"),
    [
        slow("minilm", False, "pipeline=2"),
        slow("minilm", True, "pipeline=2"),
        slow("smollm2", True, "pipeline=2"),
        slow("smollm2", False, "pipeline=2"),
        slow("smollm2", True, "shard=2,zero=3"),
        slow("minilm", False, "shard=2,zero=3"),
    ],
)
def test_a_split_model_learns_what_one_process_does(
    recipe: str, lora: bool, plan: str, trained: Any, written: Any
) -> None:
    file = written(recipe)
    one = trained(file, plan="data=1,microbatches=4", lora=lora)
    two = trained(file, plan=f"{plan},microbatches={4 if plan == 'pipeline=2' else 2}", lora=lora)
    assert losses(two.path) == pytest.approx(losses(one.path), rel=1e-5)
    before, after = (load_file(found) for found in (file.parent / "weights" / "model.safetensors", _exported(two.path)))
    names = {"smollm2": "model.layers.1.self_attn.o_proj", "minilm": "encoder.layer.1.attention.output.dense"}
    name = next(each for each in after if names[recipe] in each and each.endswith("weight"))
    assert torch.equal(before[f"{names[recipe]}.weight"], after[name]) == lora  # frozen, or not


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("plan", ["data=2,pipeline=2", "pipeline=2,shard=2,zero=3"])
def test_four_ranks_compute_what_one_does(plan: str, lora: bool, trained: Any, written: Any) -> None:
    found = api.verify(str(written("smollm2")), plan=plan, lora=lora)
    assert found.same, found.text()


def _exported(run: Path) -> Path:
    return Path(api.export(run, to="safetensors", out=run / "plain", runs=run.parent)) / "model.safetensors"


def test_weights_trained_in_stages_are_a_model_of_transformers(trained: Any, written: Any, tmp_path: Path) -> None:
    run = trained(written("smollm2"), plan="pipeline=2")
    out = api.export(run.path, to="transformers", out=tmp_path / "out", runs=run.path.parent)
    assert {"config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    loaded = tf.AutoModelForCausalLM.from_pretrained(out)
    found = _kept(run.path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, found[name]), name
    expected = _by_hand(tf.LlamaForCausalLM(tf.LlamaConfig.from_pretrained(out)), found)
    assert torch.equal(loaded(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)


def test_an_adapter_trained_in_stages_is_one_of_peft(trained: Any, written: Any, tmp_path: Path) -> None:
    run = trained(written("smollm2"), plan="pipeline=2", lora=True)
    out = api.export(run.path, to="transformers", out=tmp_path / "out", runs=run.path.parent)
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    plain = base(input_ids=TOKENS).logits
    loaded = peft.PeftModel.from_pretrained(base, out)
    adapted = loaded(input_ids=TOKENS).logits
    assert float((adapted - plain).detach().abs().max()) > 1e-4
    found, named = _kept(run.path), dict(loaded.named_parameters())
    assert all(torch.equal(parameter, found[name]) for name, parameter in named.items())
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, adapted, rtol=1e-4, atol=1e-5)


def _kept(run: Path) -> dict[str, torch.Tensor]:
    store = LocalStore(run / "checkpoints")
    manifest = newest_whole(store)
    assert manifest is not None
    return {name.removeprefix("model/"): t for name, t in read_tensors(store, manifest, ["model/"]).items()}


def _by_hand(module: Any, found: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(found[name])
    return module.eval()


def _fetched(name: str) -> None:
    import shardwise as sw

    try:
        getattr(sw, name)()
    except DataError as error:
        pytest.skip(f"{PACKAGES[name].command[-1]} cannot be fetched here: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_real_smollm2_is_exported_with_the_same_logits(lora: bool, trained: Any, tmp_path: Path) -> None:
    _fetched("smollm2")
    run = trained(RECIPES / "finetune_smollm2.py", plan="pipeline=2", lora=lora, steps=2, batch=2, context=16)
    out = api.export(run.path, to="transformers", out=tmp_path / "out", runs=run.path.parent)
    import shardwise as sw

    if lora:
        base = tf.AutoModelForCausalLM.from_pretrained(sw.smollm2(), gguf_file=next(sw.smollm2().glob("*.gguf")).name)
        loaded: Any = peft.PeftModel.from_pretrained(base, out)
        found = _kept(run.path)
        assert all(torch.equal(parameter, found[name]) for name, parameter in loaded.named_parameters())
    else:
        loaded = tf.AutoModelForCausalLM.from_pretrained(out)
        expected = _by_hand(tf.LlamaForCausalLM(tf.LlamaConfig.from_pretrained(out)), _kept(run.path))
        assert torch.equal(loaded(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
