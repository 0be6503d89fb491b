"""Exports, read back by the programs that they are for."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from shardwise.checkpoint.export import export
from shardwise.checkpoint.state import collect
from shardwise.checkpoint.store import LocalStore
from shardwise.errors import CheckpointError
from shardwise.models.gpt import GPT
from tests.cpu.checkpoint.world import Net, bits, save_alone, save_on, trained


def saved_net(place: Path) -> tuple[Net, list[torch.optim.Optimizer]]:
    net, optimizers = trained()
    tensors, scalars = collect(net, optimizers)
    save_on(2, LocalStore(place), step=3, tensors=tensors, scalars=scalars)
    return net, optimizers


def test_safetensors_load_with_their_ties(tmp_path: Path) -> None:
    net, _ = saved_net(tmp_path / "run" / "checkpoints")
    assert export(tmp_path / "run", "safetensors", tmp_path / "out") == tmp_path / "out"
    fresh = Net(seed=4)
    assert load_model(fresh, tmp_path / "out" / "model.safetensors") == (set(), [])
    assert bits(fresh.state_dict()) == bits(net.state_dict())


def test_one_checkpoint_or_the_newest_of_several(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        save_alone(store, step=step, tensors={"model/w": torch.tensor(float(step))}, keep_last=3)
    (store.path / "step-00000003" / "rank-0.safetensors").write_bytes(b"")
    for source, step in (("checkpoints", 2), ("checkpoints/step-00000001", 1), (".", 2)):
        out = export(tmp_path / source, "safetensors", tmp_path / "out" / str(len(source)))
        assert load_file(out / "model.safetensors")["w"].item() == step
    with pytest.raises(CheckpointError, match="step-00000003/rank-0.safetensors has 0 bytes"):
        export(store.path / "step-00000003", "safetensors", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_torch_distributed_checkpoint_reads_model_and_optimizers(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net, optimizers = saved_net(tmp_path / "checkpoints")
    export(tmp_path / "checkpoints", "dcp", tmp_path / "out")
    fresh, fresh_optimizers = trained(seed=8)
    expected = get_optimizer_state_dict(net, optimizers)
    state: dict[str, Any] = {
        "model": fresh.state_dict(),
        "optim": get_optimizer_state_dict(fresh, fresh_optimizers),
    }
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(state, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    assert bits(state["model"]) == bits(net.state_dict())
    for name, entries in expected["state"].items():
        assert bits(state["optim"]["state"][name]) == bits(entries)
    assert state["optim"]["param_groups"] == expected["param_groups"]


def test_a_gpt_becomes_a_llama_with_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "vocab": 50, "context": 16}
    torch.manual_seed(0)
    gpt = GPT(**settings)
    tensors, scalars = collect(gpt)
    save_alone(LocalStore(tmp_path / "checkpoints"), tensors=tensors, scalars=scalars)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
                "pre_tokenizer": {"type": "Whitespace"},
            }
        )
    )
    torch.manual_seed(1)
    out = export(
        tmp_path / "checkpoints",
        "transformers",
        tmp_path / "out",
        module=GPT(**settings),
        tokenizer=tmp_path / "tokenizer.json",
    )
    llama = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, gpt.eval()(tokens), rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)("b a")["input_ids"] == [1, 0]


def test_a_pretrained_model_is_written_as_its_library_would(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    tensors, scalars = collect(model)
    save_alone(LocalStore(tmp_path / "checkpoints"), tensors=tensors, scalars=scalars)
    torch.manual_seed(1)
    out = export(
        tmp_path / "checkpoints", "transformers", tmp_path / "out", module=transformers.BertForMaskedLM(config)
    )
    again = transformers.BertForMaskedLM.from_pretrained(out)
    assert bits(again.state_dict()) == bits(model.state_dict())


def test_what_transformers_does_not_know_is_refused_with_the_formats_that_work(tmp_path: Path) -> None:
    saved_net(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"a Net has no form in transformers.*safetensors or --to dcp"):
        export(tmp_path / "checkpoints", "transformers", tmp_path / "out", module=Net(seed=0))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"], "nothing half-written"


@pytest.mark.parametrize("to", ["safetensors", "dcp", "transformers"])
def test_a_failing_disk_leaves_nothing_behind(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = GPT(layers=1, width=8, heads=2, vocab=5, context=4)
    tensors, scalars = collect(gpt)
    save_alone(LocalStore(tmp_path / "checkpoints"), tensors=tensors, scalars=scalars)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(tmp_path / "checkpoints", to, tmp_path / "out", module=gpt)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    saved_net(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="'safetensor' is not a format.*did you mean 'safetensors'"):
        export(tmp_path / "checkpoints", "safetensor", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is already there"):
        export(tmp_path / "checkpoints", "safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        export(tmp_path / "nothing", "safetensors", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        export(tmp_path / "checkpoints", "safetensors", tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="No such file"):
        export(tmp_path / "checkpoints", "safetensors", tmp_path / "out", tokenizer=tmp_path / "none.json")
    assert not (tmp_path / "out").exists()


def test_a_module_with_a_tensor_of_its_own_kind_of_name(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a/b": nn.Linear(2, 2)})
    tensors, scalars = collect(net)
    save_alone(LocalStore(tmp_path / "checkpoints"), tensors=tensors, scalars=scalars)
    out = export(tmp_path / "checkpoints", "safetensors", tmp_path / "out")
    assert bits(load_file(out / "model.safetensors")) == bits(dict(net.state_dict()))
